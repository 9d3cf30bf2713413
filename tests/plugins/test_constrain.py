"""constrain_: bounds after every optimizer step, and schedules that survive a resume."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import SGD, AdamW, Optimizer

import models
import steppe
from steppe import JumpingSquaredReLU, Plugin, RestrictedNorm, RisingThreshold, ZerothBias
from steppe.errors import ScheduleError, SparsificationError
from steppe.plugins.applied import sparsification_of

FROM_SCRATCH = (RestrictedNorm(), ZerothBias(), JumpingSquaredReLU())
FINETUNING = (RestrictedNorm(ramp=0.5), ZerothBias(), JumpingSquaredReLU(ramp=0.5))
MakeOptimizer = Callable[[Any], Optimizer]
# So fast that the bounds are met at once.
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": functools.partial(AdamW, lr=0.1, weight_decay=0.5, foreach=False),
    "adamw foreach": functools.partial(AdamW, lr=0.1, weight_decay=0.5, foreach=True),
    "adamw fused": functools.partial(AdamW, lr=0.1, weight_decay=0.5, fused=True),
    "sgd": functools.partial(SGD, lr=50.0, momentum=0.9, foreach=False),
    "sgd foreach": functools.partial(SGD, lr=50.0, momentum=0.9, foreach=True),
    "sgd fused": functools.partial(SGD, lr=50.0, momentum=0.9, fused=True),
}
each_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def sparse_gpt2(plugins: tuple[Plugin, ...] = FROM_SCRATCH) -> nn.Module:
    """The same model each time."""
    torch.manual_seed(0)
    return steppe.sparsify_(models.gpt2(), plugins)


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    """The loss on the batch of this step."""
    ids = models.token_ids(2, 9, seed=step)
    return model(input_ids=ids, labels=ids).loss


def train_step(model: nn.Module, optimizer: Optimizer, step: int = 0) -> None:
    """One plain step."""
    loss_of(model, step).backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of its state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def by_definition_(model: nn.Module, floor: float = 1.0, limit: float = 0.1) -> int:
    """The projection from scratch, written out; returns how many entries it moved."""
    moved = 0
    with torch.no_grad():
        for block in steppe.find_blocks(model):
            scale, bias = block.norm.weight, block.up.zeroth_bias
            below = scale < floor
            scale[below] = floor
            bound = (limit * scale.abs()).expand_as(bias)
            beyond = bias.abs() > bound
            bias[beyond] = bias[beyond].sign() * bound[beyond]
            moved += int(below.sum() + beyond.sum())
    return moved


@each_optimizer
def test_a_step_is_the_optimizers_step_and_then_the_projection(
    make_optimizer: MakeOptimizer,
) -> None:
    constrained, plain = sparse_gpt2(), sparse_gpt2()
    optimizers = [make_optimizer(model.parameters()) for model in (constrained, plain)]
    steppe.constrain_(constrained, optimizers[0])
    moved = 0
    for step in range(4):
        train_step(constrained, optimizers[0], step)
        train_step(plain, optimizers[1], step)
        moved += by_definition_(plain)
        assert_same_state(state_of(constrained), state_of(plain))
    assert moved > 100


def test_the_order_of_the_plugins_does_not_matter() -> None:
    # Biases clipped to the scale as it was before the floor, 8 here, would keep 0.8 under a bound
    # of 0.1.
    orders = (FROM_SCRATCH, (ZerothBias(), RestrictedNorm(), JumpingSquaredReLU()))
    states = []
    for plugins in orders:
        model = sparse_gpt2(plugins)
        with torch.no_grad():
            for block in steppe.find_blocks(model):
                block.norm.weight.fill_(-8.0)
                block.up.zeroth_bias.fill_(2.0)
        steppe.project_(model)
        states.append(state_of(model))
        for block in steppe.find_blocks(model):
            assert (block.up.zeroth_bias.abs() <= 0.1 * block.norm.weight.abs()).all()
    assert_same_state(states[0], states[1])


def test_a_closure_and_a_learning_rate_scheduler_are_no_further_steps() -> None:
    model = sparse_gpt2()
    optimizer = SGD(model.parameters(), lr=50.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    link = steppe.constrain_(model, optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    for _ in range(3):
        optimizer.step(closure)
        scheduler.step()
        assert by_definition_(model) == 0
    assert link.state_dict() == {"step": 3}


def test_accumulated_and_clipped_gradients_make_one_step() -> None:
    model, whole = (sparse_gpt2(FINETUNING).double() for _ in range(2))
    optimizer, whole_optimizer = (SGD(each.parameters(), lr=500.0) for each in (model, whole))
    link = steppe.constrain_(model, optimizer, total_steps=4)
    steppe.constrain_(whole, whole_optimizer, total_steps=4)
    for step in range(2):
        for micro in range(3):
            (loss_of(model, 3 * step + micro) / 3).backward()
        assert link.state_dict() == {"step": step}
        torch.stack([loss_of(whole, 3 * step + micro) / 3 for micro in range(3)]).sum().backward()
        for each, opt in ((model, optimizer), (whole, whole_optimizer)):
            torch.nn.utils.clip_grad_norm_(each.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
    assert link.state_dict() == {"step": 2}
    assert sparsification_of(model).progress == 0.5
    assert model.transformer.h[0].mlp.act.mix == 1.0
    for block in steppe.find_blocks(model):
        assert block.norm.weight.abs().min() >= 1.0
        bound = 0.1 * block.norm.weight.abs()
        assert (block.up.zeroth_bias.abs() <= bound).all()
        assert (block.up.zeroth_bias.abs() == bound).any()
    torch.testing.assert_close(state_of(model), state_of(whole), rtol=1e-10, atol=1e-12)


# GradScaler calls the step of a fused optimizer in any case and lets it skip by itself.
@each_optimizer
def test_a_step_that_the_grad_scaler_skips_neither_counts_nor_moves(
    make_optimizer: MakeOptimizer,
) -> None:
    model = sparse_gpt2(FINETUNING)
    optimizer = make_optimizer(model.parameters())
    link = steppe.constrain_(model, optimizer, total_steps=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def step(poisoned: bool) -> None:
        scaler.scale(loss_of(model)).backward()
        if poisoned:
            model.transformer.wte.weight.grad[3, 3] = torch.inf
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(poisoned=False)
    assert link.state_dict() == {"step": 1}
    before = state_of(model)
    scale = scaler.get_scale()
    step(poisoned=True)
    assert scaler.get_scale() < scale  # the scaler did skip
    assert_same_state(state_of(model), before)
    assert link.state_dict() == {"step": 1}
    assert sparsification_of(model).progress == 1 / 8
    step(poisoned=False)
    assert link.state_dict() == {"step": 2}


def test_the_schedules_follow_the_steps_of_the_run() -> None:
    model = sparse_gpt2((RestrictedNorm(ramp=0.5), JumpingSquaredReLU(ramp=0.25)))
    with torch.no_grad():
        for block in steppe.find_blocks(model):
            block.norm.weight.fill_(-0.01)
    optimizer = SGD(model.parameters(), lr=0.0)
    steppe.advance_(model, 1.0)
    link = steppe.constrain_(model, optimizer, total_steps=8)
    assert sparsification_of(model).progress == 0.0
    for step in range(1, 11):  # also beyond the run
        train_step(model, optimizer)
        progress = min(1.0, step / 8)
        assert sparsification_of(model).progress == model.config.steppe["progress"] == progress
        for block in steppe.find_blocks(model):
            floor = max(0.01, min(1.0, progress / 0.5))
            torch.testing.assert_close(
                block.norm.weight.detach(), torch.full((models.D_MODEL,), -floor), rtol=0, atol=0
            )
        assert model.transformer.h[1].mlp.act.mix == min(1.0, progress / 0.25)
    assert link.state_dict() == {"step": 10}


class Run:
    """A training run with everything that a new process would make again."""

    def __init__(self) -> None:
        self.model = sparse_gpt2(FINETUNING)
        self.optimizer = AdamW(self.model.parameters(), lr=0.05, weight_decay=0.1)
        self.link = steppe.constrain_(self.model, self.optimizer, total_steps=10)

    def train(self, first: int, last: int) -> None:
        """Steps first … last - 1."""
        for step in range(first, last):
            train_step(self.model, self.optimizer, step)

    def save(self, path: Path) -> None:
        """A checkpoint."""
        parts = {"model": self.model, "optimizer": self.optimizer, "link": self.link}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)

    def load(self, path: Path, with_link: bool = True, constrain_again: bool = False) -> None:
        """Take the checkpoint up."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if constrain_again:
            self.link.remove()
            self.link = steppe.constrain_(self.model, self.optimizer, total_steps=10)
        if with_link:
            self.link.load_state_dict(state["link"])


@pytest.mark.parametrize("stop", [3, 5, 9])  # in the ramp, at its end, after it
@pytest.mark.parametrize("constrain_last", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(
    stop: int, constrain_last: bool, tmp_path: Path
) -> None:
    whole = Run()
    whole.train(0, 10)
    first = Run()
    first.train(0, stop)
    first.save(tmp_path / "checkpoint.pt")
    second, forgetful = Run(), Run()
    second.load(tmp_path / "checkpoint.pt", constrain_again=constrain_last)
    assert second.link.state_dict() == {"step": stop}
    assert_same_state(state_of(second.model), state_of(first.model))
    assert second.model.config.steppe == first.model.config.steppe
    second.train(stop, 10)
    assert_same_state(state_of(second.model), state_of(whole.model))
    assert second.model.config.steppe == whole.model.config.steppe
    assert second.link.state_dict() == whole.link.state_dict() == {"step": 10}
    # Without the link's state the schedules begin again, and that shows.
    forgetful.load(tmp_path / "checkpoint.pt", with_link=False)
    forgetful.train(stop, 10)
    assert any(
        not torch.equal(value, state_of(whole.model)[name])
        for name, value in state_of(forgetful.model).items()
    )


def test_after_remove_nothing_is_projected_or_counted() -> None:
    model = sparse_gpt2()
    optimizer = SGD(model.parameters(), lr=50.0)
    link = steppe.constrain_(model, optimizer)
    train_step(model, optimizer)
    assert by_definition_(copy.deepcopy(model)) == 0
    link.remove()
    train_step(model, optimizer)
    assert by_definition_(model) > 0
    assert link.state_dict() == {"step": 1}
    link.remove()  # once more does no harm


def test_the_context_manager_removes_the_hook_also_when_the_loop_raises() -> None:
    model = sparse_gpt2()
    optimizer = SGD(model.parameters(), lr=50.0)
    with steppe.constrain_(model, optimizer) as link:
        train_step(model, optimizer)
        assert by_definition_(copy.deepcopy(model)) == 0
    with (
        pytest.raises(KeyboardInterrupt),
        steppe.constrain_(model, optimizer),
    ):
        raise KeyboardInterrupt
    train_step(model, optimizer)
    assert by_definition_(model) > 0
    assert link.state_dict() == {"step": 1}


@pytest.fixture
def _accelerator_state() -> Iterator[None]:
    """Accelerate keeps its settings in globals."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_accelerator_state")
def test_accelerates_optimizer_steps_are_projected_under_gradient_accumulation() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = sparse_gpt2()
    model, optimizer = accelerator.prepare(plain, AdamW(plain.parameters(), lr=0.1))
    link = steppe.constrain_(model, optimizer)
    for step in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert link.state_dict() == {"step": (step + 1) // 2}
        assert by_definition_(copy.deepcopy(plain)) == 0
    biases = steppe.added_parameters(plain).values()
    assert all(bias.abs().max() > 0.09 for bias in biases)
    link.remove()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model))
            optimizer.step()
            optimizer.zero_grad()
    assert by_definition_(plain) > 0


def no_hooks(optimizer: Optimizer) -> bool:
    """Whether a refusal left nothing behind."""
    return not optimizer._optimizer_step_post_hooks


def test_an_optimizer_without_the_new_parameters_is_refused() -> None:
    model = models.gpt2()
    optimizer = AdamW(model.parameters())
    steppe.sparsify_(model, [ZerothBias()])
    name = r"transformer\.h\.0\.mlp\.c_fc\.zeroth_bias and 1 more"
    with pytest.raises(ScheduleError, match=rf"does not hold {name}.*add_param_group"):
        steppe.constrain_(model, optimizer)
    assert no_hooks(optimizer)
    optimizer.add_param_group({"params": list(steppe.added_parameters(model).values())})
    steppe.constrain_(model, optimizer)


def test_frozen_new_parameters_need_no_optimizer() -> None:
    model = models.gpt2()
    optimizer = AdamW(model.parameters())
    steppe.sparsify_(model, [ZerothBias()])
    for bias in steppe.added_parameters(model).values():
        bias.requires_grad_(False)
    steppe.constrain_(model, optimizer)


@pytest.mark.parametrize(
    "plugin", [RestrictedNorm(ramp=0.3), JumpingSquaredReLU(ramp=0.3)], ids=lambda p: p.key
)
def test_a_ramp_without_the_length_of_the_run_is_refused(plugin: Plugin) -> None:
    model = sparse_gpt2((plugin,))
    optimizer = AdamW(model.parameters())
    with pytest.raises(ScheduleError, match=rf"{type(plugin).__name__}.*total_steps=10_000"):
        steppe.constrain_(model, optimizer)
    assert no_hooks(optimizer)
    steppe.constrain_(model, optimizer, total_steps=1)


@pytest.mark.parametrize("total_steps", [0, -3])
@pytest.mark.parametrize("plugins", [FROM_SCRATCH, FINETUNING], ids=["scratch", "finetuning"])
def test_a_run_of_no_steps_is_refused(total_steps: int, plugins: tuple[Plugin, ...]) -> None:
    model = sparse_gpt2(plugins)
    optimizer = AdamW(model.parameters())
    with pytest.raises(ScheduleError, match=f"expected total_steps ≥ 1, got {total_steps}"):
        steppe.constrain_(model, optimizer, total_steps=total_steps)
    assert no_hooks(optimizer)


@pytest.mark.parametrize("restored", [False, True])
def test_a_model_without_plugins_is_refused(restored: bool) -> None:
    model = steppe.restore_(sparse_gpt2()) if restored else models.gpt2()
    optimizer = AdamW(model.parameters())
    with pytest.raises(SparsificationError, match="GPT2LMHeadModel carries no plug-in"):
        steppe.constrain_(model, optimizer)
    assert no_hooks(optimizer)
    for verb in (steppe.project_, functools.partial(steppe.advance_, progress=0.5)):
        with pytest.raises(SparsificationError, match="carries no plug-in"):
            verb(model)
    assert steppe.added_parameters(model) == {}


class SAM(torch.optim.Optimizer):
    """As it is usually written: the step is that of the optimizer inside."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], **settings: Any) -> None:
        super().__init__(params, settings)
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            change = torch.zeros_like(p) if p.grad is None else 0.05 * p.grad
            self.state[p]["change"] = change
            p.add_(change)
            p.grad = None

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(self.state[p]["change"])
        self.base_optimizer.step()
        self.zero_grad()


class Lookahead(torch.optim.Optimizer):
    """Calls the step of the optimizer inside, then moves the weights back a little."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.slow = [p.detach().clone() for g in inner.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        held = [p for group in self.inner.param_groups for p in group["params"]]
        for p, slow in zip(held, self.slow, strict=True):
            p.lerp_(slow, 0.5)
            slow.copy_(p)


class Holder:
    """No optimizer, but it has one, as DeepSpeed's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


def sparsified_layer() -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
    steppe.sparsify_(layer, [RestrictedNorm(), RisingThreshold()])
    return layer


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "SAM": lambda params: SAM(params, torch.optim.AdamW, lr=0.1),
    "Lookahead": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.1)),
    "Lookahead of Lookahead": lambda params: Lookahead(
        Lookahead(torch.optim.AdamW(params, lr=0.1))
    ),
    "a holder": lambda params: Holder(torch.optim.AdamW(params, lr=0.1)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_steps_of_a_wrapped_optimizer_count_once_and_are_projected(name: str) -> None:
    layer = sparsified_layer()
    optimizer = WRAPPERS[name](layer.parameters())
    link = steppe.constrain_(layer, optimizer, total_steps=10)
    x = torch.randn(4, 5, 16)
    for _ in range(10):
        layer(x).square().mean().backward()
        if isinstance(optimizer, SAM):
            optimizer.first_step()
            layer(x).square().mean().backward()
            optimizer.second_step()
        else:
            (optimizer if isinstance(optimizer, Lookahead) else optimizer.optimizer).step()
    assert link.state_dict() == {"step": 10}
    assert float(layer.norm2.weight.detach().min()) >= 1.0
    assert float(layer.linear1.threshold.multiple) == 2.0


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_the_zero_redundancy_optimizers_steps_count(tmp_path: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layer = sparsified_layer()
        optimizer = ZeroRedundancyOptimizer(layer.parameters(), torch.optim.AdamW, lr=0.1)
        link = steppe.constrain_(layer, optimizer, total_steps=4)
        for _ in range(4):
            layer(torch.randn(4, 5, 16)).square().mean().backward()
            optimizer.step()
        assert link.state_dict() == {"step": 4}
        assert float(layer.norm2.weight.detach().min()) >= 1.0
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("plugins", [[RestrictedNorm()], [RisingThreshold()]], ids=str)
def test_steps_of_another_optimizer_are_noticed(plugins: list[Plugin]) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
    steppe.sparsify_(layer, plugins)
    given = torch.optim.AdamW(layer.parameters(), lr=0.1)
    link = steppe.constrain_(layer, given, total_steps=100)
    other = torch.optim.AdamW(layer.parameters(), lr=0.1)
    x = torch.randn(4, 5, 16)

    def train() -> None:
        for _ in range(20):
            layer(x).square().mean().backward()
            other.step()

    with pytest.raises(ScheduleError, match="AdamW, which constrain_ was given, made no step"):
        train()
    link.remove()
    train()


def test_accumulation_and_evaluation_are_no_missing_steps() -> None:
    layer = sparsified_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    steppe.constrain_(layer, optimizer, total_steps=3)
    x = torch.randn(4, 5, 16)
    for _ in range(3):
        for _ in range(30):
            layer(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for _ in range(30):
                layer(x)


def test_what_is_no_optimizer_and_has_none_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"expected a torch\.optim\.Optimizer or a holder"):
        steppe.constrain_(sparsified_layer(), object.__new__(type("Mine", (), {})), total_steps=3)
