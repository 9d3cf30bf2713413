"""A routed block computes what its own modules do, whoever looks at them, calls or changes them."""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import models
import steppe
from steppe.bench import PATTERNS, Block
from steppe.errors import AccelerationError
from steppe.ops.cpu.library import kernels

pytestmark = [
    pytest.mark.skipif(kernels().name != "native", reason=kernels().reason),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
]
WIDTH, HIDDEN = 16, 64


def accelerate(model: nn.Module, **settings: Any) -> nn.Module:
    return steppe.accelerate_(model, patterns=PATTERNS, max_density=1.0, **settings)


def pair(gated: bool = False, act: nn.Module | None = None) -> tuple[Block, Block]:
    """A block, and the same accelerated."""
    plain = Block(WIDTH, HIDDEN, act, gated)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    return plain, fast


def last(model: nn.Module) -> steppe.BlockExplanation:
    (block,) = steppe.explain(model).blocks
    return block


@pytest.fixture(params=[1, 12], ids=["few", "many"])
def x(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(request.param, WIDTH)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_same(fast: nn.Module, plain: nn.Module, x: Tensor) -> None:
    expected = plain(x)
    for _ in range(3):
        assert torch.allclose(fast(x), expected, rtol=1e-4, atol=1e-5)


# Each leaves a trace: the handle, or nothing, by which it is taken off again.
HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda m: m.register_forward_hook(lambda m, args, z: 2.0 * z),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] + 0.5,)),
    "hook with kwargs": lambda m: m.register_forward_hook(
        lambda m, args, kwargs, z: z - 1.0, with_kwargs=True
    ),
    "global hook": lambda _: global_hooks.register_module_forward_hook(
        lambda m, args, z: z.clamp(max=0.3) if isinstance(m, nn.Linear) else None
    ),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("part", ["gate", "up", "act", "down"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_foreign_hook_sees_and_changes_what_it_did(
    kind: str, part: str, gated: bool, x: Tensor
) -> None:
    if part == "gate" and not gated:
        pytest.skip("has no gate")
    plain, fast = pair(gated)
    fast(x)
    assert last(fast).is_sparse
    unhooked = plain(x)
    with ExitStack() as stack:
        for model in (plain, fast):
            stack.callback(HOOKS[kind](getattr(model, part)).remove)
        assert torch.equal(fast(x), plain(x))
        assert not torch.allclose(plain(x), unhooked, atol=1e-3)
        assert "is not steppe's" in last(fast).reason
    assert_same(fast, plain, x)
    assert last(fast).is_sparse


def test_a_hook_that_was_there_before_sees_the_hidden_layer() -> None:
    plain, fast = Block(WIDTH, HIDDEN), Block(WIDTH, HIDDEN)
    shapes: list[torch.Size] = []
    act = fast.act
    handle = act.register_forward_hook(lambda m, args, a: shapes.append(a.shape))
    accelerate(fast)
    assert shapes == []  # the dry run calls nobody's hook
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(12, WIDTH)
    assert torch.equal(fast(x), plain(x))
    assert shapes == [(12, HIDDEN)]
    handle.remove()
    fast(x)
    assert "wiring is looked at" in last(fast).reason  # the dry run had left it alone
    fast(x)
    assert last(fast).is_sparse
    steppe.restore_(fast)
    assert fast.act is act


def test_backward_hooks_see_the_hidden_gradient() -> None:
    plain, fast = pair()
    x = torch.randn(12, WIDTH)
    seen: list[list[torch.Size]] = [[], []]
    for model, shapes in zip((plain, fast), seen, strict=True):
        model.act.register_full_backward_hook(
            lambda m, inputs, outputs, to=shapes: to.append(inputs[0].shape)
        )
        with torch.enable_grad():
            model(x).sum().backward()
    assert seen[0] == seen[1] == [(12, HIDDEN)]
    assert torch.equal(fast.up.weight.grad, plain.up.weight.grad)


@pytest.mark.parametrize("gated", [False, True])
def test_a_part_that_is_called_for_itself_does_what_it_did(gated: bool, x: Tensor) -> None:
    plain, fast = pair(gated)
    hidden = torch.randn(3, HIDDEN)
    for _ in range(2):
        assert torch.equal(fast.up(x), plain.up(x))
        assert torch.equal(fast.up(input=x), plain.up(input=x))
        assert torch.equal(fast.act(x), plain.act(x))  # as wide as the model: not the block's input
        assert torch.equal(fast.down(hidden), plain.down(hidden))
        assert torch.equal(fast.hidden(x), plain.hidden(x))  # not through the owner's forward
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fast.down(x)
        assert_same(fast, plain, x)
    assert last(fast).is_sparse


class Twice(nn.Module):
    """Runs its block twice in a call, and one of its layers for itself in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.act(self.up(x)))
        return self.down(self.act(self.up(x)))


def test_an_owner_that_runs_its_block_twice(x: Tensor) -> None:
    plain = Twice()
    fast = copy.deepcopy(plain)
    pattern = steppe.BlockPattern("twice", up="up", act="act", down="down")
    steppe.accelerate_(fast, patterns=[pattern], max_density=1.0)
    assert_same(fast, plain, x)
    assert last(fast).calls == {"sparse": 2 * 3}


class Shared(nn.Module):
    """Two blocks in one owner, with one activation and one dropout for both."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.dropout = nn.ReLU(), nn.Dropout(0.0)
        self.up1, self.down1 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.up2, self.down2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down1(self.dropout(self.act(self.up1(x))))
        return x + self.down2(self.dropout(self.act(self.up2(x))))


@pytest.mark.filterwarnings("ignore::steppe.IncompleteCoverageWarning")
def test_blocks_that_share_an_owner_and_its_activation(x: Tensor) -> None:
    patterns = [
        steppe.BlockPattern(f"{i}", up=f"up{i}", act="act", down=f"down{i}", dropout="dropout")
        for i in (1, 2)
    ]
    for first in (0, 1):  # both blocks, and one of them alone
        plain = Shared()
        fast = copy.deepcopy(plain)
        found = [
            block
            for pattern in patterns[first:]
            for block in steppe.find_blocks(fast, patterns=[pattern])
        ]
        assert found
        for pattern in patterns[first:]:
            steppe.accelerate_(fast, patterns=[pattern], max_density=1.0)
            assert_same(fast, plain, x)


def replace_down(block: Block) -> None:
    block.down = nn.Sequential(block.down, nn.Tanh())


def replace_act(block: Block) -> None:
    block.act = nn.Tanh()


def replace_forward(block: Block) -> None:
    old = block.up.forward
    block.up.forward = lambda x: old(x) + 1.0


def replace_method(block: Block) -> None:
    block.act.forward = types.MethodType(lambda self, p: F.relu(p) ** 2, block.act)


def subclass(block: Block) -> None:
    class Shifted(type(block.down)):  # type: ignore[misc]
        def forward(self, a: Tensor) -> Tensor:
            return super().forward(a) + 3.0

    block.down.__class__ = Shifted


def replace_owner(block: Block) -> None:
    block.forward = lambda x: block.down(block.act(block.up(x)).square())


def spectral(block: Block) -> None:
    parametrizations.spectral_norm(block.up.eval())


def doubled(block: Block) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    parametrize.register_parametrization(block.down, "weight", Doubled())


def pruned(block: Block) -> None:
    prune.l1_unstructured(block.up, "weight", amount=0.5)


CHANGES = [
    replace_down,
    replace_act,
    replace_forward,
    replace_method,
    subclass,
    replace_owner,
    spectral,
    doubled,
    pruned,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_change_later_is_computed(change: Callable[[Block], None], x: Tensor) -> None:
    plain, fast = pair()
    fast(x)
    before = plain(x)
    for model in (plain, fast):
        torch.manual_seed(0)
        change(model)
    assert_same(fast, plain, x)
    assert not torch.allclose(plain(x), before, atol=1e-3)


def test_a_patched_class_is_computed(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair()
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) - 0.5)
    assert torch.equal(fast(x), plain(x))
    assert last(fast).reason == "Linear.forward was replaced"
    monkeypatch.undo()
    fast(x)
    assert last(fast).is_sparse


def test_adapters_that_come_later_are_computed() -> None:
    peft = pytest.importorskip("peft")
    plain = models.gpt2().eval()
    fast = steppe.accelerate_(copy.deepcopy(plain), max_density=1.0)
    config = peft.LoraConfig(
        target_modules=["c_fc", "mlp.c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    ids = models.token_ids()
    outputs = []
    for model in (plain, fast):
        torch.manual_seed(0)
        outputs.append(peft.get_peft_model(model, config).eval()(input_ids=ids).logits)
    assert torch.equal(outputs[0], outputs[1])


def test_an_owner_below_checkpointing_gives_the_same_gradients() -> None:
    plain, fast = pair()
    x = torch.randn(12, WIDTH)
    with torch.enable_grad():
        for model in (plain, fast):
            checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for one, two in zip(plain.parameters(), fast.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    assert last(fast).is_sparse


@pytest.mark.parametrize("gated", [False, True])
def test_transforms_of_torch_func_are_right(gated: bool) -> None:
    plain, fast = pair(gated, steppe.Rectifier(1.0, 0.5))
    x, v = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    results = []
    for model in (plain, fast):
        values = dict(model.named_parameters())

        def loss(values: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            z: Tensor = torch.func.functional_call(model, values, (x,))
            return z.square().sum()

        results.append(
            [
                torch.func.jvp(model, (x,), (v,))[1],
                torch.func.vmap(model)(x[:, None]),
                torch.func.jacrev(model)(x),
                torch.func.jacfwd(model)(x),
                *torch.func.grad(loss)(values).values(),
            ]
        )
        model.requires_grad_(False)
        results[-1].append(torch.func.jvp(model, (x,), (v,))[1])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, v)
            results[-1].append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent)
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)
        assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_can_be_differentiated(gated: bool, dropout: float) -> None:
    """Against finite differences of the first gradients, by the op's own first derivative."""
    torch.manual_seed(0)
    plain, fast = pair(gated, steppe.Rectifier(1.0, 0.5))
    x = torch.randn(7, WIDTH)
    if dropout:
        pattern = [steppe.BlockPattern("d", up="0", act="1", dropout="2", down="3")]
        fast = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Dropout(dropout), nn.Linear(HIDDEN, WIDTH)
        )
        steppe.accelerate_(fast, patterns=pattern, max_density=1.0)
    with torch.enable_grad():
        weights = list(fast.parameters())
        z = fast(x.requires_grad_())
        first = torch.autograd.grad(z.square().sum(), [x, *weights], create_graph=True)
        total = sum(grad.square().sum() for grad in first)
        second = torch.autograd.grad(total, [x, *weights])
        assert all(grad.abs().max() > 0 for grad in second)
        if dropout:
            return
        first = torch.autograd.grad(
            plain(x).square().sum(), [x, *plain.parameters()], create_graph=True
        )
        total = sum(grad.square().sum() for grad in first)
        expected = torch.autograd.grad(total, [x, *plain.parameters()])
    for got, wanted in zip(second, expected, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_other_dtypes_run_the_blocks_own_modules(dtype: torch.dtype, x: Tensor) -> None:
    if dtype.is_complex:
        pytest.skip("ReLU is not defined")
    plain = Block(WIDTH, HIDDEN).to(dtype)
    fast = accelerate(copy.deepcopy(plain))
    assert torch.equal(fast(x.to(dtype)), plain(x.to(dtype)))
    assert last(fast).reason == f"there are no kernels for {dtype}"


def test_threads_that_call_one_model_do_not_see_each_other(x: Tensor) -> None:
    """One of them with a part for itself, one under a transform, some as usual."""
    plain, fast = pair()
    barrier = threading.Barrier(8)
    inputs = [torch.randn(len(x), WIDTH) for _ in range(8)]
    expected = [plain(each) for each in inputs]
    alone = [plain.up(each) for each in inputs]

    def call(place: int) -> bool:
        torch.set_num_threads(1)
        barrier.wait()
        for _ in range(100):
            with torch.no_grad():
                if place == 0:
                    right = torch.equal(fast.up(inputs[place]), alone[place])
                else:
                    got = fast(inputs[place])
                    right = torch.allclose(got, expected[place], rtol=1e-4, atol=1e-5)
            if not right:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(8)))


def test_a_call_that_ends_with_an_error_leaves_nothing_behind(x: Tensor) -> None:
    plain, fast = pair()
    with pytest.raises(RuntimeError):
        fast(torch.randn(3, WIDTH + 1))
    handle = fast.act.register_forward_hook(lambda m, args, a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fast(x)
    handle.remove()
    assert torch.equal(fast.up(x), plain.up(x))
    assert_same(fast, plain, x)


@pytest.mark.parametrize("name", ["opt", pytest.param("t5 gated", marks=pytest.mark.slow)])
def test_compiled_code_knows_of_hooks_and_of_wiring(name: str) -> None:
    """What torch.compile has not been shown, it runs by the block's own modules."""
    make = models.LANGUAGE_MODELS.get(name) or (lambda: models.t5(gated=True))
    model = models.one_layer_(make()).eval()
    inputs = models.inputs_for(model)
    expected = model(**inputs).logits
    steppe.accelerate_(model, max_density=1.0, check=False)
    assert torch.allclose(
        torch.compile(model, backend="aot_eager")(**inputs).logits, expected, atol=1e-5
    )
    torch.compiler.reset()
    model(**inputs)
    block = steppe.find_blocks(model)[0]
    handle = block.down.register_forward_hook(lambda m, args, z: 3.0 * z)
    hooked = model(**inputs).logits
    assert not torch.allclose(hooked, expected, atol=1e-3)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(**inputs).logits, hooked, atol=1e-5)
    handle.remove()
    torch.compiler.reset()
    assert torch.allclose(compiled(**inputs).logits, expected, atol=1e-5)


def test_a_layer_that_two_blocks_share(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Block(WIDTH, HIDDEN), Block(WIDTH, HIDDEN)
            self.two.up = self.one.up

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    plain = Tied()
    assert_same(accelerate(copy.deepcopy(plain)), plain, x)


# What an owner may do with its block by a flag, as nobody saw it do when it was looked at.
OTHER_USES: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "its activation is not called": lambda m, x: m.down(m.up(x)),
    "its last layer is not called": lambda m, x: m.act(m.up(x))[..., :WIDTH],
    "its last layer is called a second time": lambda m, x: (lambda a: m.down(a) + m.down(2 * a))(
        m.act(m.up(x))
    ),
    "its last layer does not get": lambda m, x: m.down(0.5 * m.act(m.up(x))),
    "last layer does not get": lambda m, x: m.down(m.act(1.0 + m.up(x))),
}
FLAGGED_PATTERN = steppe.BlockPattern(family="flagged", up="up", act="act", down="down")


class Flagged(Block):
    """A block with a forward that goes by a flag."""

    use: Callable[[Block, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.use is None else type(self).use(self, x)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("error", OTHER_USES)
def test_an_owner_that_uses_its_block_otherwise_later_is_refused(
    error: str, trains: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it did to the input it would have done to a hidden tensor: wrong, without a word."""
    fast = Flagged(WIDTH, HIDDEN).train(trains)
    plain = copy.deepcopy(fast)
    steppe.accelerate_(fast, patterns=(FLAGGED_PATTERN,), max_density=1.0)
    for _ in range(3):
        fast(x)
    monkeypatch.setattr(Flagged, "use", OTHER_USES[error])
    with pytest.raises(AccelerationError, match=error), torch.set_grad_enabled(trains):
        fast(x)
    monkeypatch.setattr(Flagged, "use", None)
    assert_same(fast, plain, x)
    monkeypatch.setattr(Flagged, "use", OTHER_USES[error])
    steppe.restore_(fast)  # as the message says
    assert_same(fast, plain, x)


@pytest.mark.parametrize("trains", [False, True])
def test_an_owner_of_a_gated_block_that_does_more_later_is_refused(
    trains: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = steppe.BlockPattern(family="flagged", gate="gate", up="up", act="act", down="down")
    fast = Flagged(WIDTH, HIDDEN, gated=True).train(trains)
    steppe.accelerate_(fast, patterns=(gated,), max_density=1.0)
    for _ in range(3):
        fast(x)
    for use in (
        lambda m, x: m.down(0.5 * m.act(m.gate(x)) * m.up(x)),
        lambda m, x: m.down(m.act(m.gate(x)) * (1.0 + m.up(x))),
        lambda m, x: m.down(m.act(m.gate(x)) + m.up(x)),
    ):
        monkeypatch.setattr(Flagged, "use", use)
        with pytest.raises(AccelerationError, match="last layer"), torch.set_grad_enabled(trains):
            fast(x)


def test_a_product_with_the_one_is_the_other_factor(x: Tensor) -> None:
    """In both orders, without a kernel; all else is as with a tensor that has a one."""
    seen: list[Tensor] = []

    class Looking(Block):
        def forward(self, x: Tensor) -> Tensor:
            a, up = self.act(self.gate(x)), self.up(x)
            seen[:] = [a, up]
            return self.down(torch.mul(up, a) if up.dim() else up * a)

    fast = accelerate(Looking(WIDTH, HIDDEN, gated=True))
    for _ in range(3):
        fast(x)
    a, one = seen
    assert a is x
    assert x * one is one * x is torch.mul(x, one) is x.mul(one) is x
    assert type(one + x) is Tensor
    assert torch.equal(one + x, 1.0 + x)
    assert (one.dim(), one.dtype, one.item()) == (0, x.dtype, 1.0)
    assert torch.equal(one * one, torch.ones(()))


@pytest.mark.parametrize("gated", [False, True])
def test_a_block_may_be_handed_a_copy_of_what_it_was_handed(gated: bool, x: Tensor) -> None:
    """As functional dropout with p = 0 does, also where something is NaN."""

    class Copying(Block):
        def hidden(self, x: Tensor) -> Tensor:
            return super().hidden(x).clone()

    plain = Copying(WIDTH, HIDDEN, gated=gated)
    fast = accelerate(copy.deepcopy(plain))
    assert_same(fast, plain, x)
    assert last(fast).how == "sparse"
    x[0, 0] = float("nan")
    assert torch.equal(fast(x).isnan(), plain(x).isnan())
