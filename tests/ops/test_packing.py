"""Copies that are kept: served while the weight is the one they were made from, and never after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steppe.ops import packing
from steppe.ops.native import kernels
from steppe.ops.packing import Probes, kept_panels

pytestmark = pytest.mark.skipif(kernels().name != "native", reason="needs the native kernels")


def expected_panels(weight: Tensor) -> Tensor:
    """``[2, N, 64]`` of a weight ``[N, 128]``."""
    return weight.detach().view(-1, 2, 64).transpose(0, 1)


def new_memory(weight: Tensor) -> None:
    """As FSDP does it: the storage gets other memory and other values, and no version is raised."""
    storage, address = weight.untyped_storage(), weight.data_ptr()
    with torch.autograd._unsafe_preserve_version_counter(weight):
        storage.resize_(storage.nbytes() + weight.nbytes)  # the old is freed after the new is there
        weight.copy_(torch.arange(weight.numel()).view(weight.shape))
    assert weight.data_ptr() != address


def in_place(weight: Tensor) -> None:
    weight[5, 100] += 1.0


def through_data(weight: Tensor) -> None:
    weight.data += 1.0


def set_data(weight: Tensor) -> None:
    weight.data = weight.data * 2.0


@pytest.mark.parametrize("change", [new_memory, in_place, through_data, set_data])
def test_a_changed_weight_is_packed_anew(change: Callable[[Tensor], None]) -> None:
    weight = torch.randn(300, 128)
    first = kept_panels(weight)
    assert kept_panels(weight) is first
    change(weight)
    again = kept_panels(weight)
    assert again is not first
    assert torch.equal(again.data, expected_panels(weight))
    assert kept_panels(weight) is again


def test_probes_are_not_looked_at_where_a_weight_was(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 128)
    kept_panels(weight)
    new_memory(weight)
    monkeypatch.setattr(Probes, "hold", lambda _: pytest.fail("reads memory that was freed"))
    assert torch.equal(kept_panels(weight).data, expected_panels(weight))


def test_no_copy_is_left_of_memory_that_a_weight_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_entries", {})
    weight = torch.randn(300, 128)
    for _ in range(3):
        kept_panels(weight)
        new_memory(weight)
    kept_panels(weight)
    assert len(packing._entries) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_see_one_value_of_those_they_look_at(dtype: torch.dtype) -> None:
    weights = [torch.zeros(80, 4, dtype=dtype), torch.full((3, 2), float("nan"), dtype=dtype)]
    probes = Probes(weights)
    assert probes.hold()
    assert len(probes.places) == 8 + 6
    weights[0][40, 0] = -0.0  # other bits, if the same value
    assert not probes.hold()
    weights[0][40, 0] = 0.0
    assert probes.hold()
    weights[1][2, 1] = 1.0
    assert not probes.hold()
    assert Probes([]).hold()
    assert Probes([torch.empty(0, 4, dtype=dtype)]).hold()
