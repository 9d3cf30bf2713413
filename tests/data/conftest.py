"""No progress bars of ``datasets`` between the tests' lines."""

from __future__ import annotations

import datasets
import pytest


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    datasets.disable_progress_bars()
