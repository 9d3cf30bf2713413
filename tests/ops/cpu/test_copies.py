"""Copies that are kept: served while the weight is the one they were made from, and never after."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steppe.ops.cpu import copies, writes
from steppe.ops.cpu.copies import cached_panels, cached_rows, declare_final, forget, why_not_cached
from steppe.ops.cpu.library import kernels

pytestmark = [
    pytest.mark.skipif(kernels().name != "native", reason="needs the native kernels"),
]
seen = pytest.mark.skipif(bool(writes.unseen()), reason=writes.unseen() or "writes are seen")


@pytest.fixture(autouse=True)
def _no_entries() -> Iterator[None]:
    copies._entries.clear()
    yield
    copies._entries.clear()


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that does not say when memory is written to."""
    monkeypatch.setattr(writes, "unseen", lambda: "old kernel")
    monkeypatch.setattr(copies, "unseen", lambda: "old kernel")


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


def part_through_data(weight: Tensor) -> None:
    weight.data[:, 100:110] = 0.0


def set_data(weight: Tensor) -> None:
    weight.data = weight.data * 2.0


def by_numpy(weight: Tensor) -> None:
    weight.numpy()[17, 3] = 7.0


def by_pointer(weight: Tensor) -> None:
    """The last element, which is on a page that other data may share."""
    address = weight.data_ptr() + weight.nbytes - 4
    ctypes.c_float.from_address(address).value = 7.0


def by_the_kernel(weight: Tensor) -> None:
    """A system call writes to the memory."""
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        zeros.readinto(memoryview(weight.numpy()).cast("B")[4096:8192])


BOTH = [new_memory, in_place, set_data]
UNCOUNTED = [through_data, part_through_data, by_numpy, by_pointer, by_the_kernel]


@seen
@pytest.mark.parametrize("change", BOTH + UNCOUNTED)
def test_a_changed_weight_is_packed_again(change: Callable[[Tensor], None]) -> None:
    weight = torch.randn(300, 128)
    first = cached_panels(weight)
    assert first is not None
    assert cached_panels(weight) is first
    change(weight)
    again = cached_panels(weight)
    assert again is not None
    assert again is not first
    assert torch.equal(again.data, expected_panels(weight))
    assert cached_panels(weight) is again


@pytest.mark.parametrize("change", BOTH)
def test_a_final_weight_is_packed_again_where_pytorch_counts(
    change: Callable[[Tensor], None], unseen: None
) -> None:
    weight = torch.randn(300, 128)
    declare_final(weight)
    first = cached_panels(weight)
    assert first is not None
    assert cached_panels(weight) is first
    change(weight)
    again = cached_panels(weight)
    if again is not None:  # other data is another storage, which nobody has said is final
        assert torch.equal(again.data, expected_panels(weight))
    assert again is not first


def test_nothing_is_kept_where_writes_are_not_seen(unseen: None) -> None:
    weight = torch.randn(300, 128)
    assert cached_panels(weight) is None
    assert cached_rows(weight) is weight  # no copy
    assert cached_rows(weight.T) is None
    assert "old kernel; accelerate_(model, weights_are_final=True)" in why_not_cached(weight)
    declare_final(weight)
    assert why_not_cached(weight) == ""
    assert cached_rows(weight.T) is not None
    forget(weight)
    assert cached_rows(weight.T) is None


@seen
def test_memory_that_others_may_write_to_is_not_copied(tmp_path: Path) -> None:
    shared = torch.randn(300, 128).share_memory_()
    np.zeros((300, 128), dtype=np.float32).tofile(tmp_path / "weight")
    path = str(tmp_path / "weight")
    of_file = torch.from_file(path, shared=True, size=300 * 128).view(300, 128)
    for weight in (shared, of_file):
        assert cached_panels(weight) is None
        assert "others may write" in why_not_cached(weight)


@seen
def test_a_weight_that_is_mapped_from_a_file_becomes_the_process_own(tmp_path: Path) -> None:
    """As Transformers loads safetensors: what is written to the file later, nobody sees."""
    path = tmp_path / "weight"
    np.arange(300 * 128, dtype=np.float32).tofile(path)
    weight = torch.from_file(str(path), size=300 * 128).view(300, 128)
    before = weight.clone()
    rows = cached_rows(weight.T)
    assert rows is not None
    assert torch.equal(rows, before.T)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(weight, before)
    assert cached_rows(weight.T) is rows
    weight.numpy()[7, 7] = -1.0
    again = cached_rows(weight.T)
    assert again is not None
    assert torch.equal(again, weight.T)


@seen
def test_views_that_overlap_are_not_both_watched() -> None:
    whole = torch.randn(600, 128)
    first, overlapping, behind = whole[:400], whole[200:], whole[400:]
    assert cached_panels(first) is not None
    assert cached_panels(overlapping) is None
    assert cached_panels(behind) is not None
    whole.numpy()[10] = 0.0
    panels = cached_panels(first)
    assert panels is not None
    assert torch.equal(panels.data, expected_panels(first))


@seen
def test_one_write_makes_all_copies_of_a_weight_untrue() -> None:
    """Though the first copy that is made again begins to watch anew."""
    weight = torch.randn(300, 128)
    cached_panels(weight), cached_rows(weight.T), copies.cached_screen(weight)
    weight.data[7, 7] = 9.0
    panels = cached_panels(weight)
    rows = cached_rows(weight.T)
    assert panels is not None
    assert rows is not None
    assert torch.equal(panels.data, expected_panels(weight))
    assert torch.equal(rows, weight.T)


@seen
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_write_is_missed_wherever_it_is(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 130))
    room = torch.zeros(rows * columns + 64)
    start = data.draw(st.integers(0, 64))
    weight = room[start : start + rows * columns].view(rows, columns).T
    for _ in range(3):
        kept = cached_rows(weight)
        assert kept is not None
        assert torch.equal(kept, weight)
        row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
        weight.numpy()[column, row] += 1.0


@seen
def test_no_copy_is_left_of_memory_that_a_weight_had() -> None:
    weight = torch.randn(300, 128)
    for _ in range(3):
        cached_panels(weight)
        new_memory(weight)
    cached_panels(weight)
    assert len(copies._entries) == 1


@seen
def test_a_watch_goes_with_its_weight() -> None:
    weights = [torch.randn(300, 128) for _ in range(3)]
    for weight in weights:
        cached_panels(weight)
    addresses = {weight.data_ptr() for weight in weights}
    assert addresses <= {start for start, _ in writes._watches}
    forget(weights.pop())
    del weight, weights
    last = torch.randn(300, 128)
    cached_panels(last)
    assert addresses & {start for start, _ in writes._watches} <= {last.data_ptr()}


@seen
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_sees_its_own_writes() -> None:
    weight = torch.randn(300, 128)
    rows = cached_rows(weight.T)
    child = os.fork()
    if child == 0:
        again = cached_rows(weight.T)
        fine = again is not None and torch.equal(again, weight.T)
        weight.numpy()[3, 3] = 9.0
        again = cached_rows(weight.T)
        os._exit(0 if fine and again is not None and torch.equal(again, weight.T) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert cached_rows(weight.T) is rows  # the parent's weight is as it was
    weight.numpy()[3, 3] = 9.0
    again = cached_rows(weight.T)
    assert again is not None
    assert torch.equal(again, weight.T)
