"""Journals, swapped classes and what copies have of them; on small modules of no architecture."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils import parametrize

import models
import steppe
from copies import PLUGINS, keep, loss_of
from steppe.blocks.block import Slot
from steppe.surgery.journal import Journal
from steppe.surgery.swapping import is_own_hook, plain_class


class Doubling(nn.Module):
    """A behaviour, for as long as its attribute is there."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return 2.0 * output if "doubles" in self.__dict__ else output


class Adding(nn.Module):
    """Another one."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output + self.adds if "adds" in self.__dict__ else output


class Copying(nn.Linear):
    """A class that says itself how it is deep-copied, and refers to itself."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.itself = [self]

    def __deepcopy__(self, memo: dict[int, Any]) -> Copying:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__ = copy.deepcopy(self.__dict__, memo)
        other.note = "by itself"
        return other


class Stating(nn.Linear):
    """A class with a state of its own."""

    def __init__(self) -> None:
        super().__init__(3, 3)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "note": "stated"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.note += " and set"


class Making(nn.Linear):
    """A class that says itself how it is made."""

    def __init__(self, note: str = "") -> None:
        super().__init__(3, 3)
        self.note = note

    def __reduce__(self) -> tuple[Any, ...]:
        return Making, ("made",)


class Owner(nn.Module):
    """A module with the kinds of attributes that are edited."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.function = F.relu
        self.module = nn.GELU()
        self.flag = True

    def forward(self, x: Tensor) -> Tensor:
        return self.module(self.function(self.layer(x)))


def by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


each_way = pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])


def double(module: nn.Module, journal: Journal) -> None:
    journal.swap_class(module, Doubling)
    journal.add_attribute(Slot(module, "doubles"), True)


def add(module: nn.Module, journal: Journal) -> None:
    journal.swap_class(module, Adding)
    journal.add_attribute(Slot(module, "adds"), 1.0)


def watch(module: nn.Module, journal: Journal) -> None:
    journal.add_forward_hook(module, keep)


def value(module: nn.Module) -> float:
    with torch.no_grad():
        return float(module(torch.ones(3)).sum())


# ---- the class swapper


def test_a_swapped_module_behaves_otherwise_under_its_own_name() -> None:
    layer, journal = nn.Linear(3, 1), Journal(transient=True)
    plain, weight = value(layer), layer.weight
    double(layer, journal)
    kind = type(layer)
    assert value(layer) == 2.0 * plain
    assert isinstance(layer, nn.Linear)
    assert kind is not nn.Linear
    assert plain_class(kind) is nn.Linear
    names = [(k.__name__, k.__qualname__, k.__module__) for k in (kind, nn.Linear)]
    assert names[0] == names[1]
    assert layer.weight is weight
    journal.undo()
    assert type(layer) is nn.Linear
    assert value(layer) == plain
    double(layer, journal)
    assert type(layer) is kind, "torch.compile finds its old code again"
    journal.undo()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_swaps_are_taken_back_in_any_order(order: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 1)
    before, plain = set(layer.__dict__), value(layer)
    journals = [Journal(transient=True) for _ in range(3)]
    for edit, journal in zip((double, watch, add), journals, strict=True):
        edit(layer, journal)
    assert value(layer) == 2.0 * plain + 1.0
    seen = {type(layer)}
    active = {0, 1, 2}
    for index in order:
        journals[index].undo()
        active.remove(index)
        want = plain * (2.0 if 0 in active else 1.0) + (1.0 if 2 in active else 0.0)
        assert value(layer) == want
        seen.add(type(layer))
    assert len(seen) == 4, "torch.compile sees another type each time"
    assert type(layer) is nn.Linear
    assert set(layer.__dict__) == before


def test_two_journals_of_one_kind_give_two_types() -> None:
    layer, first, second = nn.Linear(3, 1), Journal(transient=True), Journal(transient=True)
    watch(layer, first)
    once = type(layer)
    watch(layer, second)
    watch(layer, second)
    assert type(layer) not in (once, nn.Linear)
    first.undo()
    assert type(layer) is once
    second.undo()
    assert type(layer) is nn.Linear


def test_a_journal_that_is_not_transient_leaves_the_class() -> None:
    layer, journal = nn.Linear(3, 1), Journal()
    watch(layer, journal)
    journal.add_attribute(Slot(layer, "note"), 1)
    assert type(layer) is nn.Linear
    journal.undo()


class Half(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


@pytest.mark.parametrize("on_top_again", [False, True])
def test_the_class_that_others_have_put_on_top_stays(on_top_again: bool) -> None:
    layer, journal, later = nn.Linear(3, 1, bias=False), Journal(True), Journal(True)
    plain = value(layer)
    double(layer, journal)
    parametrize.register_parametrization(layer, "weight", Half())
    foreign = type(layer)
    assert value(layer) == plain
    if on_top_again:
        add(layer, later)
        assert value(layer) == pytest.approx(plain + 1.0)
    journal.undo()
    later.undo()
    assert type(layer) is foreign
    assert value(layer) == 0.5 * plain
    assert value(copy.deepcopy(layer)) == 0.5 * plain
    parametrize.remove_parametrizations(layer, "weight")
    assert value(layer) == 0.5 * plain
    assert type(copy.deepcopy(layer)) is type(by_pickle(layer)) is nn.Linear
    double(layer, journal)
    assert value(layer) == plain
    journal.undo()
    assert type(layer) is nn.Linear, "what was left over is gone too"
    assert "_steppe_swapped" not in layer.__dict__


def test_below_the_class_of_others_copies_are_theirs() -> None:
    layer, journal = nn.Linear(3, 1, bias=False), Journal(transient=True)
    parametrize.register_parametrization(layer, "weight", Half())
    foreign, halved = type(layer), value(layer)
    double(layer, journal)
    clone = copy.deepcopy(layer)
    assert type(clone) is foreign
    assert value(clone) == halved
    assert value(layer) == 2.0 * halved
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through"):
        pickle.dumps(layer)  # as without the swap
    journal.undo()
    assert type(layer) is foreign


def test_fsdp_may_shard_a_module_whose_class_is_swapped(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, journal = nn.Sequential(nn.Linear(3, 1)), Journal(transient=True)
        plain = value(model)
        double(model[0], journal)
        fully_shard(model[0], mesh=dist.init_device_mesh("cpu", (1,)))
        sharded = type(model[0])
        assert value(model) == pytest.approx(2.0 * plain)
        journal.undo()
        assert type(model[0]) is sharded
        assert value(model) == pytest.approx(plain)
        double(model[0], journal)
        assert value(model) == pytest.approx(2.0 * plain)
        journal.undo()
        assert type(model[0]) is sharded
    finally:
        dist.destroy_process_group()


# ---- copies


@each_way
@pytest.mark.parametrize("edits", [(double,), (watch,), (double, add), (add, watch, double)])
def test_a_copy_is_of_the_modules_own_class(
    edits: tuple[Callable[..., None], ...], copied: Callable[[nn.Module], nn.Module]
) -> None:
    layer = nn.Linear(3, 1)
    plain, attributes = value(layer), set(layer.__dict__)
    for edit in edits:
        edit(layer, Journal(transient=True))
    clone = copied(layer)
    assert type(clone) is nn.Linear
    assert set(clone.__dict__) == attributes
    assert not clone._forward_hooks
    assert value(clone) == plain
    assert clone.weight is not layer.weight
    assert type(copied(clone)) is nn.Linear


@each_way
@pytest.mark.parametrize(
    ("kind", "note"),
    [
        (Copying, {copy.deepcopy: "by itself"}),
        (Stating, dict.fromkeys((copy.deepcopy, by_pickle), "stated and set")),
        (Making, dict.fromkeys((copy.deepcopy, by_pickle), "made")),
    ],
)
def test_a_class_that_says_how_it_is_copied_is_asked(
    kind: type[nn.Module],
    note: dict[Callable[..., Any], str],
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    layer, journal = kind(), Journal(transient=True)
    double(layer, journal)
    watch(layer, journal)
    clone = copied(layer)
    assert type(clone) is kind
    assert "doubles" not in clone.__dict__
    assert not clone._forward_hooks
    assert getattr(clone, "note", None) == note.get(copied)
    if kind is Copying:
        assert clone.itself[0] is clone
    journal.undo()
    assert type(layer) is kind


@each_way
def test_a_copy_takes_back_every_kind_of_edit(copied: Callable[[nn.Module], nn.Module]) -> None:
    owner, journal, permanent = Owner(), Journal(transient=True), Journal()
    plain = value(owner)
    permanent.hold_attribute(Slot(owner, "flag"), False)
    journal.set_attribute(Slot(owner, "function"), nn.Tanh())
    journal.set_attribute(Slot(owner, "function"), torch.neg)
    journal.set_attribute(Slot(owner, "module"), nn.SiLU())
    journal.add_attribute(Slot(owner, "note"), [owner])
    journal.hold_attribute(Slot(owner, "flag"), False)
    journal.add_parameter(Slot(owner, "added"), nn.Parameter(torch.zeros(2)))
    journal.add_module(Slot(owner, "child"), nn.ReLU())
    journal.add_forward_pre_hook(owner.layer, lambda module, args: (3.0 * args[0],))
    changed = value(owner)
    clone = copied(owner)
    assert type(clone) is Owner
    assert value(clone) == plain != changed
    assert clone.function is F.relu
    assert type(clone.module) is nn.GELU
    assert list(clone._modules) == ["layer", "module"]
    assert list(clone._parameters) == []
    assert not hasattr(clone, "note")
    assert not clone.flag, "the permanent edit is kept"
    assert value(owner) == changed
    permanent.undo()
    clone = copied(owner)
    assert clone.flag
    assert not owner.flag
    journal.undo()
    assert owner.flag
    assert type(owner) is Owner
    assert set(clone.__dict__) == set(owner.__dict__)


def test_hooks_that_cannot_be_copied_are_in_nobodys_way() -> None:
    layer, journal = nn.Linear(3, 1), Journal(transient=True)
    journal.add_forward_hook(layer, lambda *_: None)
    assert not by_pickle(layer)._forward_hooks


# ---- revived


class Reviver:
    """Notes what it was called with, and makes the edits again."""

    revived: list[nn.Module]

    def __call__(self, module: nn.Module) -> None:
        Reviver.revived.append(module)
        assert [type(child) for child in module.children()] == [nn.Linear, nn.ReLU]
        assert module[0].weight.shape == (3, 3)
        double(module[0], Journal(transient=True))


@pytest.mark.parametrize("kind", [nn.Sequential, "own __deepcopy__"])
@pytest.mark.parametrize("depth", [0, 1])
@each_way
def test_a_reviver_is_called_with_every_complete_copy(
    copied: Callable[[nn.Module], nn.Module], depth: int, kind: Any
) -> None:
    Reviver.revived = []
    root = (CopyingSequential if isinstance(kind, str) else kind)(nn.Linear(3, 3), nn.ReLU())
    journal = Journal(transient=True)
    root[0].above = [root]  # a cycle
    double(root[0], journal)
    journal.revive(root, Reviver())
    whole = root if depth == 0 else nn.Sequential(root, nn.Tanh())
    clone = copied(whole)
    inner = clone if depth == 0 else clone[0]
    assert Reviver.revived == [inner]
    assert type(inner) is plain_class(type(root))
    assert inner[0].above == [inner]
    assert type(inner[0]) is type(root[0])
    assert value(clone) == value(whole)
    copy.copy(root)
    assert len(Reviver.revived) == 1, "its modules are the same, and have their edits"
    journal.undo()
    copied(whole)
    assert len(Reviver.revived) == 1


class CopyingSequential(nn.Sequential):
    """A root with a ``__deepcopy__``."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyingSequential:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__ = copy.deepcopy(self.__dict__, memo)
        return other


# ---- steppe's own hooks


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for dictionary in (module._forward_pre_hooks, module._forward_hooks)
        for hook in dictionary.values()
    ]


@pytest.mark.parametrize("plugins", PLUGINS.values(), ids=PLUGINS.keys())
def test_hooks_of_plug_ins_and_of_watch_are_told_from_foreign_ones(plugins: Any) -> None:
    model = steppe.sparsify_(models.t5(), plugins)
    with steppe.watch(model, gradients=True):
        assert all(is_own_hook(hook) for hook in hooks_of(model))
        assert len(hooks_of(model)) > 8
        clone = copy.deepcopy(model)
        assert all(is_own_hook(hook) for hook in hooks_of(clone))
        handle = model.encoder.register_forward_hook(keep)
        assert [hook for hook in hooks_of(model) if not is_own_hook(hook)] == [keep]
        handle.remove()
        loss_of(model, seed=0).backward()


def test_hooks_have_one_order_in_both_dicts() -> None:
    """The compiler of torch up to 2.12 looks a hook up by its place in the plain dict."""
    model = models.gpt2()
    block = steppe.find_blocks(model)[0]
    called: list[str] = []
    block.up.register_forward_pre_hook(lambda *_: called.append("theirs"))
    journal = Journal()
    journal.add_forward_pre_hook(block.up, lambda *_: called.append("ours"), first=True)
    block.up(torch.zeros(1, block.d_model))
    assert called == ["ours", "theirs"]
    steppe.sparsify_(model, PLUGINS["all"])
    with steppe.watch(model):
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                assert list(hooks) == list(dict.keys(hooks))
    steppe.restore_(model)
    journal.undo()
    called.clear()
    block.up(torch.zeros(1, block.d_model))
    assert called == ["theirs"]
