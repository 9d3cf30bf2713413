"""The stock Trainer on a device, where transformers is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import models  # noqa: E402
import steppe  # noqa: E402
from gpu_models import ARMS  # noqa: E402
from steppe.data.embedded import TensorDataset  # noqa: E402
from steppe.training import SteppeCallback  # noqa: E402


def train(folder: Path, device: str, dtype: str, **options: Any) -> tuple[Any, SteppeCallback]:
    torch.manual_seed(0)
    model = models.gpt2()
    steppe.sparsify_(model, ARMS["finetuning"])
    callback = SteppeCallback(every=1)
    ids = models.token_ids(16, 8)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=device == "cpu",
            seed=0,
            **({dtype: True} if dtype else {}),
        ),
        train_dataset=TensorDataset(input_ids=ids, labels=ids),
        callbacks=[callback],
    )
    trainer.train(**options)
    return trainer, callback


@pytest.mark.parametrize("dtype", ["", "bf16", "fp16"])
def test_the_trainer_trains_and_resumes(device: str, dtype: str, tmp_path: Path) -> None:
    if device == "cpu" and dtype == "fp16":
        pytest.skip("the Trainer has fp16 on GPUs only")
    whole, callback = train(tmp_path / "a", device, dtype)
    assert [entry["step"] for entry in callback.history] == [1, 2, 3, 4]
    assert 0.0 < callback.training_density < 1.0
    assert next(whole.model.parameters()).device.type == device
    losses = [log["loss"] for log in whole.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    for block in steppe.find_blocks(whole.model):
        assert block.norm.weight.min() >= 1.0
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    resumed, again = train(tmp_path / "b", device, dtype, resume_from_checkpoint=checkpoint)
    assert [entry["step"] for entry in again.history] == [1, 2, 3, 4]
    for name, tensor in whole.model.state_dict().items():
        found = resumed.model.state_dict()[name]
        torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-5, msg=name)
