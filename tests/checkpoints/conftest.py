"""A good checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints.saved_models import sparsified


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint of GPT-2."""
    sparsified().save_pretrained(tmp_path)
    return tmp_path
