"""Training with the Hugging Face Trainer; importing this imports transformers."""

from steppe.training.callback import SteppeCallback

__all__ = ["SteppeCallback"]
