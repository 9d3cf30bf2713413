"""What each process of test_callback_distributed.py runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import PrinterCallback, Trainer, TrainingArguments

import models
from steppe import JumpingSquaredReLU, RestrictedNorm, ZerothBias, accelerate_, sparsify_
from steppe.data.embedded import TensorDataset
from steppe.training import SteppeCallback, accelerated

BATCH = 4  # of all processes together


def train(folder: Path, world: int, accelerate: bool = False) -> dict[str, Any]:
    """Train with logs and saves that fall on different steps; what the callback made of it."""
    if accelerate:  # blocks this small run on the kernels only where they are forced to
        accelerated.accelerate_ = partial(accelerate_, max_density=1.0)
    torch.manual_seed(0)
    model = sparsify_(models.gpt2(), [ZerothBias(), RestrictedNorm(), JumpingSquaredReLU(ramp=0.5)])
    ids = models.token_ids(32, 8)
    callback = SteppeCallback(every=2, accelerate=accelerate)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=8,
            per_device_train_batch_size=BATCH // world,
            learning_rate=1e-2,
            logging_steps=4,
            save_steps=3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo" if world > 1 else None,
        ),
        train_dataset=TensorDataset(input_ids=ids, labels=ids),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    kept = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return {
        "history": callback.history,
        "training_density": callback.training_density,
        "saved_at_6": kept["stateful_callbacks"]["SteppeCallback"]["attributes"]["history"],
        "acceleration": callback.acceleration.record,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "logged": [log["density"] for log in trainer.state.log_history if "density" in log],
    }


def work(folder: Path, world: int, accelerate: bool = False) -> None:
    """One of several processes."""
    result = train(folder / "run", world, accelerate)
    rank = dist.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
