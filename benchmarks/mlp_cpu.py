"""What the sparse kernels gain on the CPU: one MLP block, and two whole models.

The block takes turns with the same block dense and with the block unscreened, see
`steppe.bench`: training steps, prefill and decode over densities, for one thread and for
two, then other widths, numbers of tokens and inputs. A row is the median of the
ratios of each round. The models are random ones in the shapes of T5-small and OPT-125m, their
hidden layers set to a
density; a training step and greedy generation are timed as a whole, attention, embeddings and the
head included. Real active sets, which tokens share more than random ones do, come from a small
GPT-2 with the three plug-ins, trained here for two minutes on the pydoc texts.

    python benchmarks/mlp_cpu.py --json benchmarks/results/mlp_cpu.json
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from steppe import (
    JumpingSquaredReLU,
    RestrictedNorm,
    ZerothBias,
    accelerate_,
    constrain_,
    find_blocks,
    sparsify_,
    watch,
)
from steppe.bench import (
    DECODE,
    DENSITIES,
    PREFILL,
    TRAINING,
    Setting,
    saved_bytes,
    surroundings,
    time_block,
    time_model,
    time_pair,
)
from steppe.blocks.block import MLPBlock
from steppe.data.embedded import load_pydoc_split
from steppe.files import write_json
from steppe.training.demo import language_model

THREADS = (1, 2)
SECONDS = {TRAINING: 3.0, PREFILL: 2.0, DECODE: 1.5}  # of a row, by case
EXTRA_SECONDS = 1.0
EXTRA_DENSITIES = (0.5, 0.1, 0.03)
EXTRAS = (  # besides the rows proper, for one thread
    *(Setting(case, 0.1, 768, 3072, 256) for case in (TRAINING, PREFILL)),
    *(Setting(case, 0.1, w, 4 * w, 1024) for w in (512, 1024) for case in (TRAINING, PREFILL)),
    *(Setting(case, 0.1, 2048, 8192, 256) for case in (TRAINING, PREFILL)),
    *(Setting(DECODE, 0.1, width, 4 * width, 1) for width in (512, 1024, 2048)),
    *(Setting(DECODE, 0.1, 768, 3072, tokens) for tokens in (2, 4, 8, 16, 32, 64)),
    Setting(DECODE, 0.1, 768, 3072, 1, torch.bfloat16),
    *(Setting(case, 0.1, 768, 3072, 1024, outliers=6) for case in (TRAINING, PREFILL)),
    Setting(DECODE, 0.1, 768, 3072, 1, outliers=6),
)
MODEL_DENSITY = 0.05
MODEL_SECONDS = 4.0
NEW_TOKENS = 32
TRAINED_WIDTH = 256
TRAINED_STEPS = 600
Batch = dict[str, Tensor]
Row = dict[str, Any]


def settings(quick: bool) -> list[tuple[Setting, float, int]]:
    """What is timed of a block, for how many seconds and at least how many rounds."""
    densities = (1.0, 0.1) if quick else (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, *DENSITIES[2:])
    kinds = (
        (TRAINING, 1024, torch.float32),
        (PREFILL, 1024, torch.float32),
        (DECODE, 1, torch.float32),
        (PREFILL, 1024, torch.bfloat16),
    )
    listed = [
        (
            Setting(case, density, tokens=tokens, dtype=dtype, threads=threads),
            0.3 if quick else SECONDS[case],
            3 if quick else 5,
        )
        for threads, (case, tokens, dtype), density in itertools.product(
            THREADS[:1] if quick else THREADS, kinds, densities
        )
    ]
    if not quick:
        listed += [
            (dataclasses.replace(extra, density=density), EXTRA_SECONDS, 3)
            for extra in EXTRAS
            for density in EXTRA_DENSITIES
        ]
    return listed


def t5_small() -> tuple[nn.Module, Batch, Batch]:
    """T5-small (d 512, F 2048, 6 + 6 layers, no biases): a batch to train on, a prompt."""
    config = T5Config(
        d_model=512,
        d_ff=2048,
        num_layers=6,
        num_heads=8,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        # A component that all tokens share, as trained models have it: the only thing by which
        # weights without a bias can move all pre-activations.
        model.shared.weight += 2.0
    ids = torch.randint(2, config.vocab_size, (4, 128))
    labels = torch.randint(2, config.vocab_size, (4, 64))
    return model, {"input_ids": ids, "labels": labels}, {"input_ids": ids[:1]}


def opt_125m() -> tuple[nn.Module, Batch, Batch]:
    """OPT-125m (d 768, F 3072, 12 layers, biases): a batch to train on, a prompt."""
    config = OPTConfig(
        hidden_size=768,
        ffn_dim=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        dropout=0.0,
        activation_function="relu",
    )
    ids = torch.randint(4, config.vocab_size, (4, 128))
    return OPTForCausalLM(config), {"input_ids": ids, "labels": ids}, {"input_ids": ids[:1]}


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch, Batch]]] = {
    "t5-small": t5_small,
    "opt-125m": opt_125m,
}


def set_density_(model: nn.Module, batch: Batch, density: float) -> None:
    """Set the MLP blocks, first to last, to a density on a batch, in one forward pass."""
    handles = [
        block.activated.register_forward_pre_hook(
            lambda module, arguments, density=density: _shift_(module, arguments[0], density)
        )
        for block in find_blocks(model)
    ]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def _shift_(layer: nn.Linear, x: Tensor, density: float) -> None:
    """Shift the pre-activations, by the bias or along the mean of the inputs."""
    x = x.flatten(0, -2).float()
    bias = None if layer.bias is None else layer.bias.float()
    p = nn.functional.linear(x, layer.weight.float(), bias)  # calling it would come here again
    mean = x.mean(0)
    # How much of the mean a token has: what a rank-one change of the weight multiplies.
    along = torch.ones(len(x)) if bias is not None else x @ mean / mean.square().sum()
    scaled = (p / along[:, None]).flatten()
    last = min(max(round((1.0 - density) * scaled.numel()), 1), scaled.numel() - 1)
    # Between two entries: on one, rounding would say whether it is active.
    shift = (scaled.kthvalue(last).values + scaled.kthvalue(last + 1).values) / 2.0
    if bias is not None:
        layer.bias -= shift
    else:
        layer.weight -= shift * mean / mean.square().sum()


def trained_model(steps: int) -> tuple[nn.Module, Batch]:
    """A GPT-2 of bytes with the three plug-ins, trained, and held-out text of 1024 tokens."""
    torch.manual_seed(0)
    model = language_model(TRAINED_WIDTH)
    sparsify_(model, [ZerothBias(), RestrictedNorm(), JumpingSquaredReLU()])
    split = load_pydoc_split()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1.0)
    constrain_(model, optimizer)
    for _ in range(steps):
        picked = torch.randint(len(split.train), (16,)).tolist()
        model(**_text_batch([split.train[index] for index in picked])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, _text_batch([split.held_out[index] for index in range(16)])


def _text_batch(samples: list[dict[str, Any]]) -> Batch:
    return {key: torch.stack([torch.as_tensor(one[key]) for one in samples]) for key in samples[0]}


def model_rows(name: str, threads: int, seconds: float) -> list[Row]:
    """Rows of a whole model: a training step, and greedy generation."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, batch, prompt = MODELS[name]()
    set_density_(model.train(), batch, MODEL_DENSITY)
    sparse = copy.deepcopy(model)
    accelerate_(sparse)
    rows = []
    for case, run in (("training", _train), ("generation", _generate)):
        inputs = batch if case == "training" else prompt
        dense_call, sparse_call = (
            lambda model=one, run=run, inputs=inputs: run(model, inputs) for one in (model, sparse)
        )
        times = time_pair(dense_call, sparse_call, seconds, least_rounds=3, threads=threads)
        with watch(model) as monitor:
            run(model, inputs)
        rows.append(
            {
                "case": f"{name}, {case}",
                "d": _block(model).d_model,
                "f": _block(model).d_hidden,
                "tokens": NEW_TOKENS if case == "generation" else _count_tokens(batch),
                "density": monitor.report().density,
                "dtype": "float32",
                "threads": threads,
                **times.summary(),
            }
        )
    return rows


def _block(model: nn.Module) -> MLPBlock:
    return find_blocks(model)[0]


def _count_tokens(batch: Batch) -> int:
    """Tokens that go through MLP blocks: of an encoder-decoder model, those of both sides."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in batch.values()}.values())


def _train(model: nn.Module, batch: Batch) -> float:
    """Seconds of a forward and a backward pass."""
    model.train()
    model.zero_grad()
    start = time.perf_counter()
    model(**batch).loss.backward()
    taken = time.perf_counter() - start
    model.zero_grad()
    return taken


def _generate(model: Any, prompt: Batch) -> float:
    """Seconds of greedy generation."""
    model.eval()
    start = time.perf_counter()
    model.generate(
        **prompt,
        attention_mask=torch.ones_like(prompt["input_ids"]),
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
    )
    return time.perf_counter() - start


def _show(row: Row) -> None:
    figures = (
        f"{row['case']:20} d {row['d']:4} T {row['tokens']:4} {row['dtype']:8}"
        f" threads {row['threads']} density {100 * row['density']:5.1f} %"
        f" dense {row['dense_ms']:8.2f} ms sparse {row['sparse_ms']:8.2f} ms"
        f" ratio {row['ratio']:.2f} ({row['quartiles'][0]:.2f}, {row['quartiles'][1]:.2f})"
    )
    if "bound" in row:
        figures += (
            f" bound {row['bound']:.2f} candidates {100 * row['candidates']:4.1f} %"
            f" unscreened {row['unscreened_ratio']:.2f} gain {row['gain']:.3f}"
        )
    typer.echo(figures)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows and rounds, one model.")] = False,
) -> None:
    """Measure what the sparse kernels gain."""
    rows = []
    for setting, seconds, least_rounds in settings(quick):
        row = time_block(setting, seconds, least_rounds)
        rows.append({**row, "active_sets": "outliers" if setting.outliers else "random"})
        _show(rows[-1])
    trained, text = trained_model(steps=2 if quick else TRAINED_STEPS)
    for threads, case in itertools.product(THREADS[:1] if quick else THREADS, (TRAINING, PREFILL)):
        torch.set_num_threads(threads)
        row = time_model(trained, text, case, 0.3 if quick else EXTRA_SECONDS)
        rows.append({**row, "active_sets": "trained"})
        _show(rows[-1])
    saved = [saved_bytes(Setting(TRAINING, density)) for density in (0.05, 0.5)]
    for row in saved:
        typer.echo(
            f"{row['case']:20} density {100 * row['density']:5.1f} % dense {row['dense_bytes']:,}"
            f" sparse {row['sparse_bytes']:,} share {row['share']:.3f}"
            f" (with the input {row['share_with_input']:.3f})"
        )
    whole = []
    names, seconds = (list(MODELS)[:1], 1.0) if quick else (list(MODELS), MODEL_SECONDS)
    for threads, name in itertools.product(THREADS[-1:] if quick else THREADS, names):
        for row in model_rows(name, threads, seconds):
            whole.append(row)
            _show(row)
    if json_file is not None:
        write_json(json_file, {**surroundings(), "rows": rows, "saved": saved, "models": whole})


if __name__ == "__main__":
    typer.run(main)
