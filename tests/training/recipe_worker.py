"""Runs recipes in processes of their own."""

from __future__ import annotations

import pydoc_data.topics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState

from steppe import accelerate_
from steppe.training import accelerated
from steppe.training.recipe import Recipe, read_recipe
from steppe.training.run_recipe import run_recipe

TINY_GPT = (
    '{"activation_function": "relu", "n_positions": 32, "n_embd": 16, "n_inner": 32, "n_layer": 2,'
    ' "n_head": 2, "resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.0}'
)


def write_text(folder: Path, topics: int = 40) -> Path:
    """A folder of plain text."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(pydoc_data.topics.topics)[:topics]
    text = "\n".join(pydoc_data.topics.topics[name] for name in names)
    (folder / "topics.txt").write_text(text, encoding="utf-8")
    return folder


def tiny_text_flags(data: Path, cache: Path) -> list[str]:
    """Of text-gpt: two blocks with all plug-ins and dropout, for some steps."""
    return [
        *("--data_dir", str(data), "--cache_dir", str(cache)),
        *("--model_config", TINY_GPT, "--length", "32", "--vocab_size", "300"),
        *("--max_steps", "24", "--save_steps", "3", "--eval_steps", "12"),
        *("--logging_steps", "4", "--measure_every", "2", "--held_out_samples", "16"),
        *("--per_device_train_batch_size", "4", "--ramp", "0.5", "--use_cpu", "true"),
        *("--report_to", "none", "--gradient_accumulation_steps", "2"),
    ]


def tiny_text_recipe(data: Path, cache: Path, out: Path, *flags: str) -> Recipe:
    """The recipe of those flags, and more."""
    return read_recipe(
        "text-gpt", [*tiny_text_flags(data, cache), "--output_dir", str(out), *flags]
    )


def run_tiny_text(data: Path, cache: Path, out: Path, *flags: str) -> None:
    """Run that recipe; tell each step in a file."""
    torch.set_num_threads(1)
    recipe = tiny_text_recipe(data, cache, out, *flags)
    run_recipe(recipe, on_step=lambda step, _: (out / "step").write_text(str(step)))


def allow_fsdp_on_cpu() -> None:
    """Let accelerate shard on the CPU, which it does on GPUs only; torch's FSDP2 can."""
    init = PartialState.__init__

    def init_as_if_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init_as_if_on_gpus


def work(data: Path, cache: Path, out: Path, *flags: str) -> None:
    """One of several processes."""
    if "--fsdp" in flags:
        allow_fsdp_on_cpu()
    if (
        "--accelerate" in flags
    ):  # blocks this small run on the kernels only where they are forced to
        accelerated.accelerate_ = partial(accelerate_, max_density=1.0)
    run_tiny_text(data, cache, out, *flags)
