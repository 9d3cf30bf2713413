"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
import tempfile
from importlib import metadata
from pathlib import Path

# Nothing may be downloaded, and a test must not depend on how many cores there are.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# A thread that waits lets others compute. Spinning, as is the default, tests with two threads take
# several times as long where the second core is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What is measured of this machine under two busy workers is not to be kept for its user.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="steppe-tests-")

import pytest
import torch

collect_ignore_glob = [
    "versions/*",  # programs for other environments
    # Collected for its doctests it would be a second module, with a second class of the same key.
    "howto/dummy_*.py",
]
if "STEPPE_FAKE_DEVICE" not in os.environ:
    collect_ignore_glob.append("fake/*")  # for a process of their own, see test_fake_device.py

TRITON = (Path(__file__).parent / "ops/cuda/requirements.txt").read_text("utf-8").split()[-1]
HAS_TRITON = TRITON in {
    f"triton=={found.version}" for found in metadata.distributions(name="triton")
}
if not HAS_TRITON:
    collect_ignore_glob.append("ops/cuda/*")


def pytest_report_header() -> list[str]:
    """Says which tests are left out."""
    missing = f"tests/ops/cuda: left out, there is no {TRITON} (make test-gpu-offline)"
    return [] if HAS_TRITON else [missing]


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of garbage collections: it stays anyway.

    Each run of a Trainer collects: that took a fifth of the tests' time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers for every test, whichever ran before."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
