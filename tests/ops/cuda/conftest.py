from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Bfloat16 is right in the interpreter, and fresh memory holds NaN."""
    from ops.cuda import interpreter  # not without Triton

    torch.use_deterministic_algorithms(True)
    with interpreter.repaired(), np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)
