"""A device that is not there: tensors without data, which see mixed devices and every wait.

PyTorch lets a backend be made of Python alone; under fake tensors each operation on it is checked
and nothing is computed. Registering it changes the process, so these tests have one of their own.
"""

from __future__ import annotations

import traceback
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
SOURCE = "/src/steppe/"
# Whoever calls these waits for the device.
WAITS = {
    "aten._local_scalar_dense.default",
    "aten.is_nonzero.default",
    "aten.equal.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
}


def _backend() -> types.ModuleType:
    """What torch asks a backend for."""
    module = types.ModuleType(NAME)
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
        "is_bf16_supported": True,
        "get_rng_state": torch.zeros(1, dtype=torch.uint8),
    }
    for name in ("manual_seed", "manual_seed_all", "set_rng_state", "_lazy_init", "synchronize"):
        answers[name] = None
    for name, answer in answers.items():
        setattr(module, name, lambda *args, _answer=answer, **kwargs: _answer)
    module.default_generators = []  # type: ignore[attr-defined]
    return module


_setup_privateuseone_for_python_backend(NAME, backend_module=_backend())
# Autocast has no list of its own for the device: what it would cast is not what is looked for.
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


class Watchdog(TorchDispatchMode):
    """Takes down waits for the device and copies to and from it that steppe's lines ask for.

    Attributes:
        events: what was asked for and where, and how often.
        called: every operation's name.
        truth: what a tensor of one bool is taken for where the line does not ask ``isfinite``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.truth = False
        self.events: Counter[str] = Counter()
        self.called: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and look at it."""
        name, kwargs = str(func), kwargs or {}
        self.called.add(name)
        first = args[0] if args else None
        if isinstance(first, Tensor):
            if first.device.type == NAME and (name in WAITS or _indexes_by_mask(name, args)):
                self._tell(f"wait: {name}")
            target = torch.device(kwargs.get("device") or first.device).type
            if name == "aten._to_copy.default" and target != first.device.type:
                self._tell(f"copy: {first.device.type} to {target}")
            if name == "aten.copy_.default" and args[1].device.type != first.device.type:
                self._tell(f"copy: {args[1].device.type} to {first.device.type}")
        if name == "aten.allclose.default":
            return True
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if name != "aten._local_scalar_dense.default":
                raise
            if first.dtype == torch.bool:
                frame = _own_frame()
                return self.truth or (frame is not None and "isfinite" in (frame.line or ""))
            return 1.0 if first.dtype.is_floating_point else 1

    def _tell(self, what: str) -> None:
        frame = _own_frame()
        if frame is not None:
            where = frame.filename.partition(SOURCE)[2]
            self.events[f"{what} at {where}:{frame.lineno}: {frame.line}"] += 1


def _own_frame() -> traceback.FrameSummary | None:
    """The innermost line of steppe that is being run."""
    frames = [frame for frame in traceback.extract_stack() if SOURCE in frame.filename]
    return frames[-1] if frames else None


def _indexes_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    return name == "aten.index.Tensor" and any(
        isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
    )


@contextmanager
def fake_tensors() -> Iterator[Watchdog]:
    """Everything inside is done on tensors without data."""
    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes), Watchdog() as watchdog:
        yield watchdog


def move_(model: nn.Module) -> nn.Module:
    """Put a model on the device; ``model.to`` would copy data that is not there."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # it makes memory that fake tensors do not have
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in moved:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=NAME)
                moved[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=NAME)
    return model
