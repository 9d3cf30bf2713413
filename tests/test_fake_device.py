"""The tests in `fake`, in a process of their own: a made-up device stays for its life."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_every_verb_on_a_device_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(HERE / "fake")],
        cwd=HERE.parent,
        env={**os.environ, "STEPPE_FAKE_DEVICE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
