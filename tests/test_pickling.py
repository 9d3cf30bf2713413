"""Copies of watched and of sparsified models: deep copies, saved, and in other processes.

A copy of a watched model is the plain model. A copy of a sparsified one is sparsified: trained on
with the same batches, it and the original stay bit-equal, and neither notices the other.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainingArguments

import models
import steppe
from copies import PLUGINS, STEPS, keep, loss_of, output_of, train_, train_in_child, watched_output
from steppe import watch
from steppe.plugins import Plugin
from steppe.plugins.applied import sparsification_of
from steppe.training.callback import SteppeCallback

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": models.gpt2,
    "llama": models.llama,
    "t5": models.t5,
    "vit": models.vit,
    "torch encoder": lambda: models.torch_encoder(norm_first=False),
}


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_oldest_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model, protocol=0))


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_cloudpickle(model: nn.Module) -> nn.Module:
    cloudpickle = pytest.importorskip("cloudpickle")
    return pickle.loads(cloudpickle.dumps(model))


def by_joblib(model: nn.Module) -> nn.Module:
    joblib = pytest.importorskip("joblib")
    file = io.BytesIO()
    joblib.dump(model, file)
    file.seek(0)
    return joblib.load(file)


WAYS = [copy.deepcopy, by_pickle, by_oldest_pickle, by_torch, by_cloudpickle, by_joblib]
each_way = pytest.mark.parametrize("copied", WAYS, ids=lambda way: way.__name__)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def make_up(model: nn.Module) -> dict[str, tuple[type, set[str], list[type]]]:
    """Of each module the class, the names of its attributes, and the classes of its hooks."""
    return {
        name: (
            type(module),
            set(module.__dict__),
            [
                type(hook)
                for dictionary in (module._forward_pre_hooks, module._forward_hooks)
                for hook in dictionary.values()
            ],
        )
        for name, module in model.named_modules()
    }


def assert_nothing_shared(one: nn.Module, other: nn.Module) -> None:
    addresses = [
        {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        for model in (one, other)
    ]
    assert not addresses[0] & addresses[1]
    assert not {id(m) for m in one.modules()} & {id(m) for m in other.modules()}


# ---- watched


@each_way
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_a_watched_model_is_the_plain_model(
    name: str, gradients: bool, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = MODELS[name]()
    plain, want = make_up(model), state_of(model)
    with watch(model, gradients=gradients) as monitor:
        loss_of(model, seed=0).backward()
        counts = monitor.counts()
        clone = copied(model)
        assert make_up(model) != plain, "this test must be able to fail"
        assert make_up(clone) == plain
        assert_nothing_shared(model, clone)
        assert_same_state(clone.state_dict(), want)
        loss_of(clone, seed=0).backward()
        assert torch.equal(monitor.counts(), counts), "the copy is not watched"
        loss_of(model, seed=0).backward()
        assert torch.equal(monitor.counts(), 2 * counts), "the original still is"
    assert make_up(model) == plain
    assert torch.equal(output_of(clone), output_of(model))
    if isinstance(clone, nn.TransformerEncoder):
        assert clone.use_nested_tensor
    with watch(clone, gradients=gradients) as monitor:
        loss_of(clone, seed=0).backward()
    assert torch.equal(monitor.counts(), counts)


@each_way
def test_a_copy_of_a_model_that_is_watched_twice_is_plain(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = models.torch_encoder(norm_first=False)
    plain = make_up(model)
    with watch(model), watch(model, gradients=True):
        clone = copied(model)
    assert make_up(clone) == plain
    assert clone.use_nested_tensor


@each_way
def test_a_part_of_a_watched_model_is_copied_plain(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = models.gpt2()
    mlp = model.transformer.h[0].mlp
    plain = make_up(mlp)
    with watch(model, gradients=True):
        clone = copied(mlp)
    assert make_up(clone) == plain
    x = torch.randn(2, 3, models.D_MODEL)
    assert torch.equal(clone(x), mlp(x))


@each_way
def test_hooks_of_the_user_are_copied_from_a_watched_model(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = models.gpt2()
    layer = model.transformer.h[0].mlp.c_fc
    with watch(model):
        layer.of_user = layer.register_forward_hook(double)  # with a handle that is copied too
        clone = copied(model)
        want = output_of(model)
    other = clone.transformer.h[0].mlp.c_fc
    assert list(other._forward_hooks.values()) == [double]
    assert torch.equal(output_of(clone), want)
    other.of_user.remove()
    assert not other._forward_hooks
    layer.of_user.remove()
    assert torch.equal(output_of(clone), output_of(model))
    assert not torch.equal(output_of(clone), want)


def double(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return 2.0 * output


def test_a_shallow_copy_of_a_watched_model_is_of_its_own_class() -> None:
    model = models.gpt2()
    kind = type(model)
    with watch(model, gradients=True):
        clone = copy.copy(model)
        assert type(model) is not kind
    assert type(clone) is kind
    assert clone.transformer is model.transformer
    assert torch.equal(output_of(clone), output_of(model))


# ---- sparsified


@each_way
@pytest.mark.parametrize("plugins", PLUGINS.values(), ids=PLUGINS.keys())
def test_a_copy_of_a_sparsified_model_trains_on_as_the_original_does(
    plugins: list[Plugin], copied: Callable[[nn.Module], nn.Module]
) -> None:
    check_copy(models.gpt2(), plugins, copied)


@each_way
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2"])
def test_a_copy_with_all_plug_ins_trains_on_as_the_original_does(
    name: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    check_copy(MODELS[name](), PLUGINS["all"], copied)


def check_copy(
    model: nn.Module, plugins: list[Plugin], copied: Callable[[nn.Module], nn.Module]
) -> None:
    """Copy a model half way through a run, and train both to the end."""
    plain = make_up(model)
    steppe.sparsify_(model, plugins)
    train_(model, 0, STEPS // 2)
    sparsified, before = make_up(model), state_of(model)
    clone = copied(model)
    assert make_up(clone) == sparsified
    assert_nothing_shared(model, clone)
    assert torch.equal(output_of(clone.eval()), output_of(model.eval()))

    losses = train_(clone.train(), STEPS // 2, STEPS)
    after = state_of(clone)
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert_same_state(model.state_dict(), before)
    assert losses == train_(model.train(), STEPS // 2, STEPS)
    assert_same_state(model.state_dict(), after)
    assert sparsification_of(clone).record() == sparsification_of(model).record()

    for name, added in steppe.added_parameters(clone).items():
        assert added.any(), name
        with torch.no_grad():
            added.add_(1.0)
    assert_same_state(model.state_dict(), after)
    steppe.restore_(clone)
    assert make_up(clone) == plain
    assert make_up(model) == sparsified
    steppe.restore_(model)
    assert torch.equal(output_of(clone), output_of(model))


@each_way
def test_a_copy_of_a_sparsified_and_watched_model_is_sparsified(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = models.torch_encoder(norm_first=False)
    plain = make_up(model)
    steppe.sparsify_(model, PLUGINS["all"])
    train_(model, 0, STEPS // 2)
    sparsified = make_up(model)
    with watch(model, gradients=True):
        clone = copied(model)
    assert make_up(clone) == sparsified
    assert not clone.use_nested_tensor
    assert train_(clone, STEPS // 2, STEPS) == train_(model, STEPS // 2, STEPS)
    steppe.restore_(clone)
    assert make_up(clone) == plain
    assert clone.use_nested_tensor


# ---- other processes


def test_a_spawned_process_trains_sparsified_and_watched_models() -> None:
    trained = []
    for plugins in PLUGINS.values():
        trained.append(steppe.sparsify_(models.gpt2(), plugins))
        train_(trained[-1], 0, STEPS // 2)
    # The child's parameters are those that it is sent, in shared memory.
    sent = copy.deepcopy(trained)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=train_in_child, args=(there, sent))
    with watch(sent[0]), watch(sent[-1], gradients=True):
        process.start()
    there.close()
    got = [here.recv() for _ in trained]
    process.join(timeout=60)
    assert process.exitcode == 0
    for model, (losses, output) in zip(trained, got, strict=True):
        assert losses == [float(loss) for loss in train_(model, STEPS // 2, STEPS)]
        assert output == output_of(model).tolist()


def test_in_a_fresh_process_the_hooks_of_a_part_are_not_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = steppe.sparsify_(models.gpt2(), PLUGINS["zeroth bias"])
    train_(model, 0, STEPS)
    part = model.transformer.h[0].mlp.c_fc
    saved = pickle.dumps(part)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    clone = pickle.loads(saved)
    hooks = list(clone._forward_pre_hooks.values())
    handles = [clone.register_forward_pre_hook(keep) for _ in range(30)]
    assert list(clone._forward_pre_hooks.values())[: len(hooks)] == hooks
    assert len(clone._forward_pre_hooks) == len(hooks) + len(handles)


def test_a_worker_of_joblib_runs_a_watched_model() -> None:
    joblib = pytest.importorskip("joblib")
    model = steppe.sparsify_(models.gpt2(), PLUGINS["all"])
    train_(model, 0, STEPS // 2)
    with joblib.parallel_config(backend="loky", n_jobs=2), watch(model, gradients=True) as monitor:
        (counts, output), *_ = joblib.Parallel()([joblib.delayed(watched_output)(model)] * 2)
        assert not monitor.counts().any()
        assert torch.equal(output, output_of(model))
        assert counts == monitor.counts().tolist()


# ---- the Trainer


def without_others(made: dict[str, Any]) -> dict[str, Any]:
    """What `make_up` says, less the attributes that the Trainer sets."""
    return {
        name: (kind, {a for a in attributes if a.startswith("_steppe")}, hooks)
        for name, (kind, attributes, hooks) in made.items()
    }


class Copies(TrainerCallback):
    """Copies the model at the end of each step."""

    def __init__(self) -> None:
        self.made: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.made += [(copied(model), state_of(model)) for copied in (copy.deepcopy, by_torch)]


def test_a_model_is_copied_plain_while_the_trainer_measures_it(tmp_path: Path) -> None:
    model = steppe.sparsify_(models.gpt2(), PLUGINS["all"])
    loss_of(model, seed=0)  # its first pass
    sparsified = make_up(model)
    copies = Copies()
    items = [{"input_ids": ids, "labels": ids} for ids in models.token_ids(8, 7)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(
        model, arguments, train_dataset=items, callbacks=[SteppeCallback(every=1), copies]
    ).train()
    assert len(copies.made) == 4
    for clone, state in copies.made:
        assert without_others(make_up(clone)) == without_others(sparsified)
        assert_same_state(clone.state_dict(), state)
        loss_of(clone, seed=0).backward()
