"""Saved models with plug-ins: written by ``save_pretrained``, loaded by anybody."""

from steppe.checkpoints.load import load_pretrained, load_weights_

__all__ = ["load_pretrained", "load_weights_"]
