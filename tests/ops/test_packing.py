"""`packed_mlp` against float64, at every capacity; what it keeps; as PyTorch sees it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from steppe.ops import rectifier
from steppe.ops.packing import packed_mlp, packed_mlp_backward
from steppe.ops.room import NO_ROOM, Room

ROWS, WIDTH, HIDDEN = 7, 5, 70
RULES = [(1.0, 0.0), (1.0, 0.5), (0.0, 1.0)]
SHAPES = [(0, 5, 70), (1, 5, 70), (1, 1, 1), (3, 4, 31), (2, 8, 32), (5, 3, 33), (4, 16, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def leaves_for(
    rows: int,
    width: int,
    hidden: int,
    dtype: torch.dtype = torch.float64,
    biases: bool = True,
    is_linear: bool = True,
) -> list[Tensor | None]:
    """x, W, b, V and c, with gradients; the matrices as nn.Linear has them, or as Conv1D."""
    up, down = torch.randn(hidden, width), torch.randn(hidden, width)
    if is_linear:
        down = down.T.contiguous().T
    else:
        up = up.T.contiguous().T
    x, bias, out = torch.randn(rows, width), torch.randn(hidden) - 0.5, torch.randn(width)
    tensors = [x, up / width**0.5, bias if biases else None, down / hidden**0.5]
    tensors.append(out if biases else None)
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def packed(leaves: Sequence[Tensor | None], rule: tuple[Any, ...], capacity: int) -> Tensor:
    return packed_mlp(*leaves, *rule, capacity, NO_ROOM)[0]


def dense(leaves: Sequence[Tensor | None], rule: tuple[Any, ...]) -> Tensor:
    """The block by plain operations, that autograd differentiates."""
    x, up, bias, down, out = leaves
    alpha, beta, mix = rule
    r = torch.relu(torch.nn.functional.linear(x, up, bias))
    a = alpha * r  # without 0 · ∞ where β is 0
    if beta:
        a = a + beta * (1.0 if mix is None else mix) * r * r
    return torch.nn.functional.linear(a, down.T, out)


def gradients(z: Tensor, leaves: Sequence[Tensor | None]) -> list[Tensor]:
    wanted = [leaf for leaf in leaves if leaf is not None]
    direction = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view(z.shape).to(z.dtype)
    return list(torch.autograd.grad(z, wanted, direction))


def count_of(leaves: Sequence[Tensor | None]) -> int:
    """Active entries."""
    x, up, bias, *_ = leaves
    return int((torch.nn.functional.linear(x, up, bias) > 0).sum())


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("rows", "width", "hidden"), SHAPES)
@pytest.mark.parametrize(("alpha", "beta"), RULES)
def test_forward_and_backward_are_those_of_plain_operations(
    alpha: float, beta: float, rows: int, width: int, hidden: int, biases: bool, is_linear: bool
) -> None:
    leaves = leaves_for(rows, width, hidden, biases=biases, is_linear=is_linear)
    rule = alpha, beta, torch.tensor(0.75, dtype=torch.float64)
    expected = dense(leaves, rule)
    count = count_of(leaves)
    for capacity in {0, count // 2, max(count - 1, 0), count, rows * hidden}:
        z = packed(leaves, rule, capacity)
        assert torch.allclose(z, expected, rtol=1e-12, atol=1e-13)
        wanted = gradients(expected, leaves)
        given = [leaf for leaf in leaves if leaf is not None]
        for got, want, leaf in zip(gradients(z, leaves), wanted, given, strict=True):
            assert torch.allclose(got, want, rtol=1e-11, atol=1e-13)
            assert got.stride() == leaf.stride() or not got.numel()
        expected = dense(leaves, rule)
    assert rows * hidden < 60 or (0 < count < rows * hidden and expected.abs().max() > 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_each_dtype_is_right_within_its_rounding(share: float, dtype: torch.dtype) -> None:
    leaves = leaves_for(33, 16, 130, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rule = 1.0, 0.5, None
    z, expected = packed(leaves, rule, int(share * count_of(leaves))), dense(exact, rule)
    pairs = [(z, expected)]
    pairs += zip(gradients(z, leaves), gradients(expected, exact), strict=True)
    for got, want in pairs:
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= 8 * EPS[dtype] * want.norm()
        assert want.norm() > 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gradcheck_once_and_twice(share: float) -> None:
    leaves = leaves_for(4, 3, 35)
    capacity = int(share * count_of(leaves))
    mix = torch.tensor(0.5, dtype=torch.float64)

    def block(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return packed_mlp(*leaves, 1.0, 0.5, mix, capacity, NO_ROOM, True)[:2]

    assert torch.autograd.gradcheck(block, leaves)
    assert torch.autograd.gradgradcheck(block, leaves)  # of the gradients that there are
    z, l1 = block(*leaves)
    total = z.square().sum() + l1.sum()
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    for got, want in zip(torch.autograd.grad(total, leaves, create_graph=True), once, strict=True):
        assert torch.allclose(got, want, rtol=1e-11)
        assert want.abs().max() > 0.01


def test_opcheck() -> None:
    leaves = leaves_for(ROWS, WIDTH, HIDDEN, torch.float32)
    rule = 1.0, 0.5, torch.tensor(0.5)
    capacity = count_of(leaves)  # values behind the last one are anything
    torch.library.opcheck(packed_mlp, (*leaves, *rule, capacity, NO_ROOM, True))
    plain = [leaf.detach() for leaf in leaves]
    z, l1, *saved = packed_mlp(*plain, *rule, capacity, NO_ROOM, True)
    for needs in ([True] * 5, [False, True, False, True, False]):
        arguments = (torch.randn_like(z), torch.randn_like(l1), *plain, *rule, *saved, NO_ROOM)
        torch.library.opcheck(packed_mlp_backward, (*arguments, needs))


@pytest.mark.parametrize("capacity", [0, 100, ROWS * HIDDEN])
def test_nan_and_infinity_propagate_as_in_dense(capacity: int) -> None:
    for bad in (math.nan, math.inf):
        leaves = leaves_for(ROWS, WIDTH, HIDDEN, torch.float32)
        with torch.no_grad():
            leaves[0][4, 2] = bad
        rule = 1.0, 0.0, None
        z, expected = packed(leaves, rule, capacity), dense(leaves, rule)
        assert expected.isnan().any()
        pairs = [(z, expected)]
        pairs += zip(gradients(z, leaves), gradients(expected, leaves), strict=True)
        for got, want in pairs:
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.allclose(got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0), atol=1e-5)


class Products(TorchDispatchMode):
    """Counts matrix products, also those inside of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.name() in ("aten::mm", "aten::addmm", "aten::matmul"):
            self.count += 1
        if op is torch.ops.steppe.packed_mlp_backward.default:
            with self:
                return packed_mlp_backward._backend_fns[None](*args, **(kwargs or {}))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "products"),
    [
        ((), 4),
        ((0,), 3),  # x without a gradient
        ((1,), 3),
        ((3,), 3),
        ((0, 1), 2),  # ∂ℓ/∂a for the bias, ∂ℓ/∂V
        ((0, 1, 2), 1),
        ((0, 1, 2, 3), 0),
        ((1, 2, 3, 4), 2),
    ],
)
def test_products_that_nobody_needs_are_left_out(frozen: tuple[int, ...], products: int) -> None:
    leaves = leaves_for(ROWS, WIDTH, HIDDEN)
    for index in frozen:
        leaves[index].requires_grad_(False)
    rule = 1.0, 0.5, None
    z, expected = packed(leaves, rule, ROWS * HIDDEN), dense(leaves, rule)
    with Products() as mode:
        z.sum().backward()
    got = [leaf.grad for leaf in leaves]
    assert mode.count == products
    assert [grad is None for grad in got] == [index in frozen for index in range(5)]
    for leaf in leaves:
        leaf.grad = None
    expected.sum().backward()
    for one, leaf in zip(got, leaves, strict=True):
        assert one is None or torch.allclose(one, leaf.grad, rtol=1e-11)


def test_the_sizes_of_activations_and_their_gradient() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        leaves = leaves_for(ROWS, WIDTH, HIDDEN, dtype)
        capacity = count_of(leaves) // 2
        z, l1, *_ = packed_mlp(*leaves, 1.0, 0.5, None, capacity, NO_ROOM, True)
        x, up, bias, *_ = leaves
        r = torch.relu(torch.nn.functional.linear(x, up, bias))
        a = r + 0.5 * r * r
        wide = torch.promote_types(dtype, torch.float32)
        expected = a.sum(1, dtype=wide)
        assert l1.dtype == wide
        limit = 1e-12 if dtype == torch.float64 else 0.02
        assert torch.allclose(l1, expected, rtol=limit)
        got = torch.autograd.grad(z.square().sum() + l1.sum() * 3, leaves[1])[0]
        want = torch.autograd.grad(
            dense(leaves, (1.0, 0.5, None)).square().sum() + expected.sum() * 3, leaves[1]
        )[0]
        assert torch.allclose(got, want, rtol=10 * limit, atol=10 * limit * want.abs().max())
        alone = packed_mlp(*leaves, 1.0, 0.5, None, capacity, NO_ROOM, True)[1]
        assert torch.autograd.grad(alone.sum(), leaves[1])[0].abs().max() > 0.1


def test_gradients_add_up_over_calls_and_uses() -> None:
    leaves = leaves_for(ROWS, WIDTH, HIDDEN)
    rule, room = (1.0, 0.5, None), Room()

    def twice(block: Callable[[Sequence[Tensor | None]], Tensor]) -> list[Tensor]:
        grads = [torch.zeros_like(leaf) for leaf in leaves]
        for scale in (1.0, 2.0):  # two micro-batches, and the block twice in each
            x, *weights = leaves
            z = block([block([x * scale, *weights]), *weights])
            for total, grad in zip(grads, gradients(z, leaves), strict=True):
                total += grad
        return grads

    def with_room(inputs: Sequence[Tensor | None]) -> Tensor:
        capacity = room.capacity(ROWS * HIDDEN)
        return packed_mlp(*inputs, *rule, capacity, room.number)[0]

    for got, want in zip(twice(with_room), twice(lambda x: dense(x, rule)), strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    assert room.share > 0


def kept_bytes(block: Callable[[], Tensor], known: Sequence[Tensor]) -> int:
    """Bytes that a call keeps for its backward pass beyond tensors that are there anyway."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.0, 0.5)])
@pytest.mark.parametrize(("density", "most"), [(0.05, 1 / 8), (0.10, 1 / 5)])
def test_what_is_kept_is_a_fraction_of_the_one_hidden_tensor_that_a_dense_block_keeps(
    density: float, most: float, alpha: float, beta: float
) -> None:
    """Compared with nn.Linear, the activation and nn.Linear in bfloat16, at their best.

    Such a block keeps its input, which is there anyway, and a, which both the activation (ReLU, and
    steppe's own rectifiers) and the second layer need. Activations from plain operations keep more.
    """
    rows, width, hidden = 128, 64, 4096
    up, down = (nn.Linear(*s).to(torch.bfloat16) for s in ((width, hidden), (hidden, width)))
    x = torch.randn(rows, width).to(torch.bfloat16)
    with torch.no_grad():
        up.bias -= up(x).float().quantile(1.0 - density)
        found = (up(x) > 0).float().mean().item()
    assert abs(found / density - 1) < 0.05
    parameters = [*up.parameters(), *down.parameters()]
    whole = kept_bytes(lambda: down(rectifier.rectifier(up(x), alpha, beta)), [x, *parameters])
    assert whole == rows * hidden * 2

    room = Room()

    def block() -> Tensor:
        capacity = room.capacity(rows * hidden)
        inputs = x, up.weight, up.bias, down.weight.T, down.bias
        return packed_mlp(*inputs, alpha, beta, None, capacity, room.number)[0]

    block().sum().backward()  # as nothing is known before, with more room
    packed = kept_bytes(block, [x, *parameters])
    assert density < packed / whole <= most
    assert room.capacity(rows * hidden) > found * rows * hidden  # nothing is recomputed


def test_the_room_is_that_of_the_last_step_and_results_do_not_depend_on_it() -> None:
    leaves = leaves_for(64, WIDTH, HIDDEN)
    room, capacities = Room(), []
    for shift in (0.0, -1.0, -2.0, 2.0, 2.0):
        with torch.no_grad():
            leaves[2] += shift
        capacities.append(room.capacity(64 * HIDDEN))
        z, *_, values = packed_mlp(*leaves, 1.0, 0.5, None, capacities[-1], room.number)
        assert values.shape == (capacities[-1],)
        expected = gradients(dense(leaves, (1.0, 0.5, None)), leaves)
        for got, want in zip(gradients(z, leaves), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-11, atol=1e-13)
    assert capacities[0] == 64 * HIDDEN * 5 // 8
    assert capacities[1] > 2 * capacities[2] > 2 * capacities[3]
    assert count_of(leaves) > 2 * capacities[3]  # so the fourth did not fit


@pytest.mark.parametrize("uses", [1, 2])
def test_a_checkpoint_finds_tensors_of_the_shapes_that_it_had(uses: int) -> None:
    """Also with two calls under way, as in a pipeline; the room follows when all are done."""
    leaves, room = leaves_for(ROWS, WIDTH, HIDDEN), Room()
    x, *weights = leaves

    def block(x: Tensor) -> Tensor:
        capacity = room.capacity(ROWS * HIDDEN)
        return packed_mlp(x, *weights, 1.0, 0.5, None, capacity, room.number)[0]

    before = room.size.shape
    shapes = []
    for _ in range(3):
        losses = []
        for _ in range(uses):
            losses.append(checkpoint(block, x, use_reentrant=False).square().sum())
            shapes.append(room.size.shape)
        for loss in losses:
            got = torch.autograd.grad(loss, x)[0]
            want = torch.autograd.grad(dense(leaves, (1.0, 0.5, None)).square().sum(), x)[0]
            assert torch.allclose(got, want, rtol=1e-10)
        with torch.no_grad():
            weights[1] -= 0.7
    assert len(set(shapes)) == 3
    assert shapes[0] == before
    assert all(len(set(shapes[step * uses : step * uses + uses])) == 1 for step in range(3))


def test_compiled_code_is_not_compiled_again_for_each_room() -> None:
    leaves, room, compiled = leaves_for(64, WIDTH, HIDDEN), Room(), Counter[str]()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager  # slow

        compiled["graphs"] += 1
        return aot_eager(graph, inputs)

    def block(*leaves: Tensor) -> Tensor:
        capacity = room.capacity(64 * HIDDEN)
        return packed_mlp(*leaves, 1.0, 0.5, None, capacity, room.number)[0]

    torch._dynamo.reset()
    fast, rooms = torch.compile(block, fullgraph=True, backend=backend), set()
    for _ in range(12):
        expected = gradients(dense(leaves, (1.0, 0.5, None)), leaves)
        for got, want in zip(gradients(fast(*leaves), leaves), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-11, atol=1e-13)
        rooms.add(room.size.shape)
        with torch.no_grad():
            leaves[2] -= 0.2
    torch._dynamo.reset()
    assert len(rooms) > 8
    assert compiled["graphs"] == 2


def test_a_batch_of_gradients_by_vmap_is_right() -> None:
    leaves = leaves_for(ROWS, WIDTH, HIDDEN)
    z = packed(leaves, (1.0, 0.5, None), ROWS * HIDDEN)
    directions = torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)[:3]
    got = torch.autograd.grad(z, leaves[1], directions, is_grads_batched=True)[0]
    z = dense(leaves, (1.0, 0.5, None))
    want = torch.autograd.grad(z, leaves[1], directions, is_grads_batched=True)[0]
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-13)
