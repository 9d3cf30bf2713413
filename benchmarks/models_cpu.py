"""What `accelerate_` gains on whole models of true shapes, on the CPU.

NLLB-600M translates greedily and with 4 beams; T5-base generates, and does a training step, as do
T5-small, OPT-125m and a ViT-S with a small head; two layers of Nemotron-4B (squared ReLU), and one
and two of a gated 7B model (Llama's shape with ReLU), in bfloat16, are given a prompt, and decode.
Attention, embeddings and the head are timed too. Weights are random, and the first layers are
shifted so that a share ρ of the hidden entries is active; a row has the share that was measured
while it ran.

Dense and accelerated take turns in one process, on the same Parameters; a row is the median of the
ratios of the rounds. Each row's outputs are compared as well: tokens must be the same, and what is
no token must agree within rounding. The program ends with an error where they do not.

    python benchmarks/models_cpu.py --json benchmarks/results/models_cpu.json
"""

from __future__ import annotations

import copy
import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NemotronConfig,
    NemotronModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mlp_cpu import set_density_
from steppe import accelerate_, explain, find_blocks, restore_, watch
from steppe.bench import surroundings, time_pair
from steppe.blocks.linear import linear_weight
from steppe.files import write_json

DENSITIES = (0.1, 0.05)
THREADS = (1, 2)
SECONDS = 3.0  # of a row, at least
# How far outputs may be apart, as a share of their norm: some roundings. Without the MLPs they are
# ten times as far apart and more.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
# Gradients: of an entry within rounding of zero the derivative is 0 or 1, dense as well as sparse.
TRAINING_TOLERANCE = 1e-2
_LOUDER = 8.0  # the MLPs than at initialisation, where they hardly change what attention says
NEW_TOKENS = 12
Batch = dict[str, Tensor]
Row = dict[str, Any]
Run = Callable[[Any, Batch], list[Tensor]]


@dataclass(frozen=True)
class Subject:
    """A model in the shape of a known one.

    Attributes:
        make: the model, in its dtype, and a batch; with True tiny ones.
        runs: what is timed of it, by name; each gives the outputs to compare.
    """

    make: Callable[[bool], tuple[nn.Module, Batch]]
    runs: dict[str, Run]


def nllb_600m(quick: bool) -> tuple[nn.Module, Batch]:
    """NLLB-200-distilled-600M: d 1024, F 4096, 12 + 12 layers, 256 206 tokens."""
    width, vocabulary, layers = (64, 512, 1) if quick else (1024, 256_206, 12)
    config = M2M100Config(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        activation_function="relu",
    )
    ids = torch.randint(4, vocabulary, (1, 32))
    return M2M100ForConditionalGeneration(config), {"input_ids": ids, "labels": ids.flip(1)}


def t5(quick: bool, width: int, layers: int, samples: int, tokens: int) -> tuple[nn.Module, Batch]:
    """T5 with F = 4 d and twice as many layers as given, no biases; half as many tokens decoded."""
    width, vocabulary, layers = (64, 512, 1) if quick else (width, 32_128, layers)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=width // 64,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    _share_component_(model)
    samples, tokens = (2, 64) if quick else (samples, tokens)
    ids = torch.randint(2, vocabulary, (samples, tokens))
    return model, {"input_ids": ids, "labels": ids[:, : tokens // 2].contiguous()}


def opt_125m(quick: bool) -> tuple[nn.Module, Batch]:
    """OPT-125m: d 768, F 3072, 12 layers, 50,272 tokens; 1,024 tokens a step."""
    width, vocabulary, layers, tokens = (64, 512, 1, 32) if quick else (768, 50_272, 12, 512)
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=12 if not quick else 4,
        max_position_embeddings=tokens,
        dropout=0.0,
    )
    ids = torch.randint(4, vocabulary, (2, tokens))
    return OPTForCausalLM(config), {"input_ids": ids, "labels": ids}


def vit_s(quick: bool) -> tuple[nn.Module, Batch]:
    """ViT-S/16 with ReLU: d 384, F 1536, 12 layers, 10 classes; 8 images of 197 tokens a step."""
    width, layers, size, images = (64, 1, 64, 2) if quick else (384, 12, 224, 8)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=size,
        hidden_act="relu",
        num_labels=10,
    )
    pixels = torch.randn(images, 3, size, size)
    labels = torch.randint(10, (images,))
    return ViTForImageClassification(config), {"pixel_values": pixels, "labels": labels}


def nemotron_4b(quick: bool) -> tuple[nn.Module, Batch]:
    """Two layers of Nemotron-4B (Minitron): d 3072, F 9216, squared ReLU, no biases."""
    width = 64 if quick else 3072
    config = NemotronConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=width // 24 // 2 * 2,
        hidden_act="relu2",
    )
    return _layers(NemotronModel(config))


def gated_7b(quick: bool, layers: int = 2) -> tuple[nn.Module, Batch]:
    """Layers of a 7B model of Llama's shape with ReLU: d 4096, F 11008, gated, no biases."""
    width, hidden = (64, 192) if quick else (4096, 11_008)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=32,
        hidden_act="relu",
    )
    return _layers(LlamaModel(config))


def _layers(model: nn.Module) -> tuple[nn.Module, Batch]:
    """Layers without a head in bfloat16, and a prompt."""
    _share_component_(model)
    return model.to(torch.bfloat16), {"input_ids": torch.randint(4, 1024, (1, 256))}


@torch.no_grad()
def _share_component_(model: Any) -> None:
    """Give all embeddings a component in common, as trained models have it.

    It is the only thing by which weights without a bias can move all pre-activations.
    """
    embedding = model.get_input_embeddings().weight
    embedding += 2.0 * embedding.std() * torch.randn(embedding.shape[1])


def generate(model: Any, batch: Batch, beams: int = 1) -> list[Tensor]:
    """Tokens, and the logits of each step, of the first sample."""
    ids = batch["input_ids"][:1]
    found = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=beams,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return [found.sequences, *found.logits]


def train(model: Any, batch: Batch) -> list[Tensor]:
    """The loss, and the gradients of the first block's weights."""
    loss = model.train()(**batch).loss
    loss.backward()
    gradients = [layer.weight.grad for layer in find_blocks(model)[0].layers]
    model.zero_grad()
    return [loss.detach(), *gradients]


@torch.no_grad()
def prefill(model: Any, batch: Batch) -> list[Tensor]:
    """What the layers make of a prompt."""
    return [model.eval()(**batch, use_cache=False).last_hidden_state]


@torch.no_grad()
def decode(model: Any, batch: Batch) -> list[Tensor]:
    """What the layers make of one token after the other."""
    model.eval()
    past, found = None, []
    for token in batch["input_ids"][:, :NEW_TOKENS].split(1, dim=1):
        output = model(input_ids=token, past_key_values=past, use_cache=True)
        past = output.past_key_values
        found.append(output.last_hidden_state)
    return found


_OF_LAYERS: dict[str, Run] = {"prefill": prefill, "decode": decode}
SUBJECTS = {
    "NLLB-600M": Subject(nllb_600m, {"greedy": generate, "4 beams": partial(generate, beams=4)}),
    "T5-base": Subject(
        partial(t5, width=768, layers=12, samples=2, tokens=64),
        {"greedy": generate, "training": train},
    ),
    "T5-small": Subject(
        partial(t5, width=512, layers=6, samples=8, tokens=128), {"training": train}
    ),
    "OPT-125m": Subject(opt_125m, {"training": train}),
    "ViT-S": Subject(vit_s, {"training": train}),
    "Nemotron-4B, 2 layers": Subject(nemotron_4b, _OF_LAYERS),
    "gated 7B, 1 layer": Subject(partial(gated_7b, layers=1), _OF_LAYERS),
    "gated 7B, 2 layers": Subject(gated_7b, {"decode": decode}),
}


def difference(dense: Sequence[Tensor], sparse: Sequence[Tensor]) -> float:
    """How far outputs are apart, as a share of the norm of each; inf if tokens differ.

    Example:
        >>> difference([torch.tensor([2, 3]), torch.ones(2)], [torch.tensor([2, 3]), torch.ones(2)])
        0.0
        >>> difference([torch.tensor([2, 3])], [torch.tensor([2, 4])])
        inf
        >>> difference([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.5])])
        0.1
    """
    furthest = 0.0
    for one, other in zip(dense, sparse, strict=True):
        if not one.is_floating_point():
            furthest = furthest if torch.equal(one, other) else float("inf")
            continue
        apart = (one.double() - other.double()).norm() / one.double().norm()
        furthest = max(furthest, float(apart.nan_to_num(nan=float("inf"))))
    return furthest


def made(name: str, quick: bool) -> tuple[nn.Module, Batch]:
    """A model and a batch, the same ones each time."""
    torch.manual_seed(0)
    model, batch = SUBJECTS[name].make(quick)
    with torch.no_grad():
        for block in find_blocks(model):
            block.down.weight *= _LOUDER
    return model, batch


def rows_of(
    name: str, densities: Sequence[float], threads: Sequence[int], seconds: float, quick: bool
) -> list[Row]:
    """The rows of a model."""
    dense, batch = made(name, quick)
    rows = []
    for density in densities:
        set_density_(dense.eval(), batch, density)
        for number in threads:
            torch.set_num_threads(number)
            shared = {id(one): one for one in (*dense.parameters(), *dense.buffers())}
            # Tiny blocks would run dense: there is too little to do.
            density_up_to = 1.0 if quick else None
            sparse = accelerate_(copy.deepcopy(dense, shared), max_density=density_up_to)
            for case, run in SUBJECTS[name].runs.items():
                row = _row(dense, sparse, partial(run, batch=batch), seconds)
                most = TRAINING_TOLERANCE if run is train else TOLERANCE[row["dtype"]]
                about = {"model": name, "case": case, "wanted_density": density}
                rows.append({**about, **row, "is_same": row["difference"] <= most})
                _show(rows[-1])
            restore_(sparse)
    return rows


def _row(
    dense: nn.Module, sparse: nn.Module, run: Callable[[nn.Module], list[Tensor]], seconds: float
) -> Row:
    """A row of one model and case."""
    run(sparse)  # dense: a block sees its density first
    calls = partial(_timed, run, dense), partial(_timed, run, sparse)
    times = time_pair(*calls, seconds, least_rounds=3, threads=torch.get_num_threads())
    # Afterwards, when it is known how the blocks run.
    outputs, how = run(sparse), Counter(one.how for one in explain(sparse).blocks)
    with watch(dense) as monitor:
        apart = difference(run(dense), outputs)
    block = find_blocks(dense)[0]
    return {
        "d": block.d_model,
        "f": block.d_hidden,
        "dtype": str(linear_weight(block.down).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "density": monitor.report().density,
        "difference": apart,
        "blocks": dict(how),
        **times.summary(),
    }


def _timed(run: Callable[[nn.Module], list[Tensor]], model: nn.Module) -> float:
    """Seconds of a run."""
    start = time.perf_counter()
    run(model)
    return time.perf_counter() - start


def _show(row: Row) -> None:
    typer.echo(
        f"{row['model']:22} {row['case']:9} {row['dtype']:8} threads {row['threads']}"
        f" density {100 * row['density']:4.1f} % dense {row['dense_ms']:9.1f} ms"
        f" accelerated {row['sparse_ms']:9.1f} ms ratio {row['ratio']:.2f}"
        f" ({row['quartiles'][0]:.2f}, {row['quartiles'][1]:.2f}) of {row['rounds']}"
        f" apart {row['difference']:.1e} {row['blocks']}"
    )


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes and few rounds.")] = False,
    model: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(SUBJECTS)}; all by default.")
    ] = None,
    density: Annotated[list[float] | None, typer.Option(help="0.1 and 0.05 by default.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="1 and 2 by default.")] = None,
) -> None:
    """Measure what `accelerate_` gains on whole models."""
    rows = []
    for name in model or SUBJECTS:
        rows += rows_of(
            name,
            density or (DENSITIES[:1] if quick else DENSITIES),
            threads or (THREADS[:1] if quick else THREADS),
            0.0 if quick else SECONDS,
            quick,
        )
        gc.collect()  # models hold circles; the next one wants the memory
    if json_file is not None:
        write_json(json_file, {**surroundings(), "models": rows})
    wrong = [f"{row['model']}, {row['case']}" for row in rows if not row["is_same"]]
    if wrong:
        typer.echo(f"other outputs than dense: {'; '.join(wrong)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
