"""The formulas of docs/scale.md against what is counted on small models."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import steppe
from pages import load_page
from steppe.blocks.find import find_blocks
from steppe.measures.tally import Tally
from steppe.measures.watch import watch

scale = load_page("scale")
SMALL = scale.Model("small", 16, 48, 2, False, 3 * 5, 5, 2)


def vit() -> nn.Module:
    """Five tokens an image: four patches and a class token."""
    return ViTForImageClassification(
        ViTConfig(
            **{"hidden_act": "relu", "image_size": 8, "patch_size": 4, "hidden_size": 16},
            **{"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            **{"hidden_act": "relu", "hidden_size": 16, "intermediate_size": 48},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32},
        )
    )


@pytest.mark.parametrize(("make", "gated"), [(vit, False), (llama, True)])
def test_weights_and_flops_are_those_counted(make, gated: bool) -> None:
    block = find_blocks(make())[0]
    layers = [block.up, block.down, *([block.gate] if gated else [])]
    small = replace(SMALL, gated=gated, blocks=1)
    assert scale.weights_of(small) == sum(layer.weight.numel() for layer in layers)
    x = torch.randn(3, 5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = torch.relu(layers[-1](x)) * block.up(x) if gated else torch.relu(block.up(x))
        block.down(hidden).sum().backward()
    assert scale.step_flops(small, 1.0)[0] == counter.get_total_flops()
    assert scale.step_flops(small, 1.0)[1] == counter.get_total_flops()
    dense, sparse = scale.step_flops(small, 0.05)
    assert dense / sparse == pytest.approx(9 / 1.4 if gated else 6 / 1.25)


@pytest.mark.parametrize("gated", [False, True])
def test_what_dense_keeps_is_what_is_counted(gated: bool) -> None:
    block = find_blocks(llama() if gated else vit())[0]
    x = torch.randn(3, 5, 16)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.dim() > 2 or tensor.shape[0] == 15:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = torch.relu(block.gate(x)) * block.up(x) if gated else torch.relu(block.up(x))
        block.down(hidden)
    kept.pop(x.data_ptr(), None)
    dense, listed = scale.saved_bytes(replace(SMALL, gated=gated), 0.05, 4)
    assert dense * 15 == sum(kept.values())
    assert listed < dense / 6


def test_the_plugins_add_what_is_counted() -> None:
    model = vit()
    before = sum(parameter.numel() for parameter in model.parameters())
    plugins = [steppe.ZerothBias(), steppe.RestrictedNorm(), steppe.JumpingSquaredReLU()]
    steppe.sparsify_(model, plugins)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert after - before == scale.added_parameters(SMALL) * SMALL.blocks
    added = steppe.added_parameters(model).values()
    assert sum(parameter.numel() for parameter in added) == after - before


def test_the_monitor_sums_what_is_counted() -> None:
    model = vit()
    with watch(model, gradients=True) as monitor:
        labels = torch.zeros(3, dtype=torch.int64)
        model(pixel_values=torch.randn(3, 3, 8, 8), labels=labels).loss.backward()
        tallies = monitor.take()
    sent = sum(
        getattr(tally, field.name).numel() * getattr(tally, field.name).element_size()
        for tally in tallies
        for field in fields(Tally)
    )
    assert sent == scale.tally_bytes(SMALL) * SMALL.blocks


@pytest.mark.parametrize("devices", [2, 5])
def test_a_ring_sends_what_is_counted(devices: int) -> None:
    """All-reduce by a ring, played: in each of n − 1 rounds a device sends a chunk, twice over."""
    numbers = 40 * devices
    held = [torch.full((devices, 40), float(rank)) for rank in range(devices)]
    sent = 0
    for phase in ("scatter", "gather"):
        for turn in range(devices - 1):
            chunks = [(rank - turn + (phase == "gather")) % devices for rank in range(devices)]
            packets = [held[rank][chunks[rank]].clone() for rank in range(devices)]
            sent += packets[0].numel()
            for rank in range(devices):
                to = held[(rank + 1) % devices]
                if phase == "scatter":
                    to[chunks[rank]] += packets[rank]
                else:
                    to[chunks[rank]] = packets[rank]
    total = float(sum(range(devices)))
    assert all(bool((part == total).all()) for part in held)
    assert scale.ddp_bytes(numbers, devices, 4) == pytest.approx(4 * sent)
    # A gather and a scatter are one phase each.
    assert scale.fsdp_bytes(numbers, devices, 4) == pytest.approx(3 * 4 * sent / 2)


def test_the_page_has_the_tables_of_the_formulas() -> None:
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.render(page) == page
    assert scale.render(page.replace("| ViT-B/16 |", "| gone |")) == page
