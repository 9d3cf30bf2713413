"""Up to 16 tokens through a block, gated or not, in the interpreter.

Against float64, and with a screen and without. Tensor cores do not add as the interpreter does; how
they round is modelled below.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ops.cuda import interpreter
from ops.cuda.test_decode import (
    ALL_CASES,
    DTYPES,
    TOLERANCES,
    along_inputs_residual_of_two_bytes,
    turned,
)
from ops.cuda.test_pack import Guarded
from ops.screening_cases import Case, Make, active_somewhere, along_residual
from steppe.errors import KernelError
from steppe.ops import screening
from steppe.ops.cuda import decode_tokens
from steppe.ops.cuda.decode import MOST_TOKENS, Screen, decode_token, most_of, screen_of
from steppe.ops.cuda.decode_launch import Lists
from steppe.ops.cuda.decode_tokens import Config, launch, launch_find
from steppe.ops.cuda.decode_tokens_kernels import (
    add_rows_of_tokens,
    find_active_of_tokens,
    grids_of,
)
from steppe.ops.reference import Rule, Weights, ceil_div
from steppe.ops.reference import mlp as definition

pytestmark = [interpreter.NEEDED, pytest.mark.usefixtures("poisoned")]
SMALL = Config(32, 64, 64, 4, 3, 32, 16, 2)  # several programs, steps and batches
# T, D, F and density.
BLOCKS = [
    (2, 80, 100, 0.1), (5, 131, 77, 0.1), (16, 64, 40, 0.3), (3, 16, 15, 0.5), (1, 1, 1, 0.5),
    (3, 64, 40, 0.0), (3, 64, 40, 1.0),
]  # fmt: skip
CASE_TOKENS = 6

Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def block_of(
    tokens: int,
    width: int,
    units: int,
    density: float,
    dtype: torch.dtype = torch.float32,
    gated: bool = False,
) -> Block:
    """x, K, b, V, c, U and d; of each token about that share of the units is active."""
    x = torch.randn(tokens, width).to(dtype)
    weight, down, up = (torch.randn(units, width).to(dtype) for _ in range(3))
    p = x.double() @ weight.double().T
    bias = -torch.quantile(p, 1.0 - density).repeat(units) + (1.0 if density == 1.0 else 0.0)
    bias, up_bias = bias.to(dtype), torch.randn(units).to(dtype)
    down_bias = torch.randn(width).to(dtype)
    return x, weight, bias, down, down_bias, up if gated else None, up_bias if gated else None


def expected(block: Block, alpha: float, beta: float) -> Tensor:
    x, weight, bias, down, down_bias, up, up_bias = (
        None if part is None else part.double() for part in block
    )
    weights = Weights(weight, bias, up, up_bias, down, down_bias)
    return definition(x, weights, Rule(alpha, beta, 0.0))[0]


def same(one: Tensor, other: Tensor) -> bool:
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(one[~nan], other[~nan])


def both_ways(
    block: Block, beta: float = 0.0, config: Config = SMALL, screen: Screen | None = None
) -> Tensor:
    """z, after it was found to be the same bits with the screen and without it."""
    screen = screen_of(block[1], block[2]) if screen is None else screen
    z, other = (launch(*block, one, (1.0, beta), config) for one in (screen, None))
    assert same(z, other)
    return z


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "units", "density"), BLOCKS)
def test_tokens_have_their_z(
    tokens: int, width: int, units: int, density: float, dtype: torch.dtype, gated: bool
) -> None:
    torch.manual_seed(0)
    block = block_of(tokens, width, units, density, dtype, gated)
    guarded = [None if part is None else Guarded(part) for part in block]
    z = both_ways(tuple(one and one.tensor for one in guarded), 0.5)
    assert (z.dtype, z.shape) == (dtype, (tokens, width))
    wanted = expected(block, 1.0, 0.5)
    if wanted.abs().max() < torch.finfo(dtype).max:
        for got, one in zip(z, wanted, strict=True):  # each token by itself
            assert torch.dist(got.double(), one) <= 1.2 * TOLERANCES[dtype] * one.norm()
    assert all(one is None or one.is_whole() for one in guarded)


@pytest.mark.parametrize("rule", [(0.0, 1.0), (0.5, 0.0), (0.75, 0.5)])
def test_every_rectifier_has_its_z(rule: tuple[float, float]) -> None:
    torch.manual_seed(0)
    block = block_of(2, 64, 40, 0.3, gated=True)
    z = launch(*block, screen_of(block[1], block[2]), rule, SMALL)
    wanted = expected(block, *rule)
    assert torch.dist(z.double(), wanted) <= TOLERANCES[torch.float32] * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1024, 2048])
def test_the_launches_that_are_shipped_compute_the_same(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = block_of(3, 64, 80, 0.1, dtype, gated=True)
    z = both_ways(block, config=decode_tokens.config_of(width, dtype))
    wanted = expected(block, 1.0, 0.0)
    assert torch.dist(z.double(), wanted) <= TOLERANCES[dtype] * wanted.norm()


def test_no_kernel_writes_outside_of_what_is_its_own() -> None:
    torch.manual_seed(0)
    tokens, width, units = 3, 40, 50
    x, weight, bias, down, down_bias, up, up_bias = block_of(tokens, width, units, 0.3, gated=True)
    words, bounds = screen_of(weight, bias)
    number = ceil_div(units, SMALL.rows)
    length = words.shape[1]
    grids = Guarded.fresh(2, tokens, length, dtype=torch.int32)
    sizes = Guarded.fresh(3, tokens, dtype=torch.float32)
    grids_of[(tokens,)](
        x, grids.tensor, sizes.tensor, tokens, **decode_tokens.grids_constants_of(width, False)
    )
    counts = Guarded.fresh(number, dtype=torch.int32)
    listed = Guarded.fresh(number, SMALL.rows, dtype=torch.int32)
    values = Guarded.fresh(number, SMALL.rows, MOST_TOKENS, dtype=torch.float32)
    lists = counts.tensor, listed.tensor, values.tensor
    bytes_of_x, bytes_of_weight = grids.tensor.view(torch.int8), words.view(torch.int8)
    find_active_of_tokens[(number,)](
        *(x, bytes_of_x, sizes.tensor, bytes_of_weight, bounds, weight, bias, up, up_bias),
        *(*lists, tokens, units, 1.0, 0.0),
        **decode_tokens.constants_of(width, True, SMALL, False),
    )
    z = Guarded.fresh(tokens, width, dtype=torch.float32)
    add_rows_of_tokens[(ceil_div(width, SMALL.down_columns),)](
        *(*lists, down, down_bias, z.tensor, tokens, width, number),
        **decode_tokens.down_constants_of(number, SMALL, x.dtype, False),
    )
    for guarded in (grids, sizes, counts, listed, values, z):
        assert guarded.is_whole()
    block = x, weight, bias, down, down_bias, up, up_bias
    assert torch.equal(z.tensor, launch(*block, Screen(words, bounds), (1.0, 0.0), SMALL))
    # Written to: all of a listed unit, and nothing behind the last one.
    for count, of_list in zip(counts.tensor.tolist(), values.tensor, strict=True):
        assert of_list[:count].isfinite().all()
        assert of_list[count:].isnan().all()


def dense_values(lists: Lists, tokens: int, units: int) -> Tensor:
    """a ``[T, F]``, after the lists were found to be in order."""
    a = torch.zeros(units, MOST_TOKENS)
    for first, count, listed, values in zip(
        range(0, units, SMALL.rows), lists.counts.tolist(), lists.units, lists.values, strict=True
    ):
        own = listed[:count].long()
        assert ((own >= first) & (own < min(first + SMALL.rows, units))).all()
        assert (own.diff() > 0).all()
        a[own] = values[:count]
    assert not a[:, tokens:].any()
    return a[:, :tokens].T


@pytest.mark.parametrize("gated", [False, True])
def test_a_unit_is_listed_if_it_is_active_for_any_token(gated: bool) -> None:
    torch.manual_seed(0)
    block = block_of(4, 64, 90, 0.1, gated=gated)
    x, weight, bias, _, _, up, up_bias = block
    lists = launch_find(*block[:3], up, up_bias, screen_of(weight, bias), (1.0, 0.5), SMALL)
    p = x.double() @ weight.double().T + bias.double()
    assert (p > 0).any(0).sum() > (p > 0).sum(1).max()
    assert int(lists.counts.sum()) == int((p > 0).any(0).sum())
    a = p.clamp(min=0) + 0.5 * p.clamp(min=0).square()
    if gated:
        a = a * (x.double() @ up.double().T + up_bias.double())
    got = dense_values(lists, 4, 90)
    assert torch.equal(got != 0, p > 0)  # of each token by itself
    torch.testing.assert_close(got.double(), a, rtol=1e-5, atol=1e-5)


def test_a_tokens_activations_do_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    block = block_of(5, 64, 90, 0.1, gated=True)
    x, weight, bias, _, _, *of_up = block
    together = dense_values(launch_find(x, weight, bias, *of_up, None, (1.0, 0.5), SMALL), 5, 90)
    for token, row in zip(x.split(1), together, strict=True):
        alone = launch_find(token, weight, bias, *of_up, None, (1.0, 0.5), SMALL)
        assert torch.equal(dense_values(alone, 1, 90)[0], row)


@pytest.mark.parametrize("screens", [False, True])
def test_each_row_that_can_matter_is_read_once_and_no_other(screens: bool) -> None:
    torch.manual_seed(0)
    tokens, width, units = 3, 64, 90
    block = block_of(tokens, width, units, 0.1, gated=True)
    x, weight, bias, down, _, up, _ = block
    screen = screen_of(weight, bias) if screens else None
    with interpreter.loads() as loads:
        z = launch(*block, screen, (1.0, 0.5), SMALL)
    active = ((x.double() @ weight.double().T + bias.double()) > 0).any(0)
    assert 0 < active.sum() < units // 2
    for read in (up, down):
        assert torch.equal(interpreter.entries_read(read, loads), width * active)
    of_weight = interpreter.entries_read(weight, loads)
    if screen is None:
        assert (of_weight == width).all()
        return
    assert (interpreter.entries_read(screen.words.view(torch.int8), loads) == width).all()
    candidate = ~(above(x, weight, bias, 1.05) <= 0).all(0)
    assert candidate.sum() < active.sum() + 5
    assert (of_weight[active] == width).all()
    assert not (of_weight.bool() & ~candidate).any()
    # So whatever is in the others has no effect.
    down[~active], up[~active], weight[~candidate] = math.nan, math.nan, math.nan
    assert torch.equal(launch(*block, screen, (1.0, 0.5), SMALL), z)
    down[active.nonzero()[0]] = math.nan
    assert launch(*block, screen, (1.0, 0.5), SMALL).isnan().all()


@pytest.mark.parametrize("where", ["x", "weight", "bias", "up"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_as_without_steppe(where: str, value: float) -> None:
    torch.manual_seed(0)
    block = block_of(3, 64, 32, 0.1, gated=True)
    x, weight, bias, down, down_bias, up, up_bias = block
    weight[5] = 0.0  # its p is b, which is below zero: −∞ keeps it inactive
    {"x": x, "weight": weight, "bias": bias, "up": up}[where].view(-1)[5] = value
    r = torch.relu(x @ weight.T + bias)
    a = r * (x @ up.T + up_bias)
    z = both_ways(block)
    # A row of V that no token has active is no 0 · NaN.
    active = (~(r <= 0)).any(0)
    wanted = torch.where(r <= 0, 0.0, a)[:, active] @ down[active] + down_bias
    assert torch.equal(z.isnan(), wanted.isnan())
    assert torch.equal(z.isfinite(), wanted.isfinite())
    assert z[1:].isfinite().any() or where != "x"  # the other tokens


def test_zeros_are_inactive_and_the_least_number_above_is_active() -> None:
    torch.manual_seed(0)
    x, weight, _, down, down_bias, *_ = block_of(2, 64, 32, 0.1)
    bias = torch.full((32,), -0.0)
    weight[:] = 0.0
    down[:] = math.nan
    z = both_ways((x, weight, bias, down, down_bias, None, None))
    assert torch.equal(z, down_bias.expand(2, -1))
    bias[3] = 1e-45
    assert both_ways((x, weight, bias, down, down_bias, None, None)).isnan().all()


def above(x: Tensor, weight: Tensor, bias: Tensor, factor: float) -> Tensor:
    """The bound ``[T, F]`` in float64, its slack, with that of tensor cores, longer by a factor."""
    of_x = screening.quantise(x, most_of(x.shape[1]), rotates=False)
    of_weight = screening.quantise(weight, rotates=False)
    slack = screening.slack(of_x, of_weight, bias)
    more = (2 * x.shape[1] + 64) * 2.0**-24 * of_x.norm[:, None] * of_weight.norm
    return screening.estimate(of_x, of_weight) + factor * (slack + more) + bias.double()


def run_case(make: Make) -> tuple[Case, Screen]:
    x, weight, bias = make(torch.Generator().manual_seed(1))
    return (x[:CASE_TOKENS].contiguous(), weight, bias), screen_of(weight, bias)


def candidates_of(x: Tensor, weight: Tensor, screen: Screen) -> Tensor:
    """bool ``[F]``: with an infinite bias all that are computed are active."""
    units, width = weight.shape
    rows = 1 << max(units - 1, 15).bit_length()
    wide = min(1 << max(width - 1, 15).bit_length(), 8192)
    config = Config(rows, wide, wide, 4, 3, 32, 16, 2)
    bias = torch.full((units,), math.inf, dtype=x.dtype)
    lists = launch_find(x, weight, bias, None, None, screen, (1.0, 0.0), config)
    found = torch.zeros(units, dtype=torch.bool)
    found[lists.units[0, : int(lists.counts)].long()] = True
    return found


@pytest.mark.parametrize("make", ALL_CASES, ids=lambda make: make.__name__)
def test_no_active_unit_is_missed_and_few_others_are_taken(make: Make) -> None:
    case, screen = run_case(make)
    x, weight, _ = case
    active = active_somewhere(*case)
    allowed = ~(above(*case, 1.05) <= 0)
    is_tiny = (x.abs().amax(1) < 1e-28)[:, None] | (weight.abs().amax(1) < 1e-28)
    allowed |= is_tiny  # all of what is tiny are taken
    # Together, and the first and the last alone, whose units no other token brings in.
    for some in (slice(None), slice(0, 1), slice(-1, None)):
        found = candidates_of(x[some], weight, screen)
        assert not (active[some].any(0) & ~found).any()
        assert not (found & ~allowed[some].any(0)).any()


@pytest.mark.parametrize(
    ("make", "part", "factor"),
    # The room for rounding, of two float32 sums, is more than a hundredth of the first.
    [(turned(along_residual), 1, 0.98), (along_inputs_residual_of_two_bytes, 2, 0.4)],
    ids=["residual of K", "residual of x"],
)
def test_a_shorter_bound_would_miss_units(make: Make, part: int, factor: float) -> None:
    case, screen = run_case(make)
    screen.bounds[part] *= factor
    x, weight, _ = case
    active = active_somewhere(*case)
    found = [candidates_of(token, weight, screen) for token in x.split(1)]
    assert (active & ~torch.stack(found)).any()


def on_tensor_cores(x: Tensor, weight: Tensor, bias: Tensor, at_once: int) -> Tensor:
    """x Kᵀ + b, as published tests of tensor cores have found that these add.

    Some products and the sum so far are aligned to the largest of them, what is below 24 bits is
    cut off, and so it is of their sum: Fasi, Higham, Mikaitis and Pranesh, PeerJ CS 7:e330, 2021.
    """
    products = x.double()[:, None] * weight.double()
    total = torch.zeros_like(products[..., 0])
    for some in products.split(at_once, -1):
        addends = torch.cat([total[..., None], some], -1)
        total = cut_off(cut_off(addends, addends.abs().amax(-1, keepdim=True)).sum(-1))
    return (total + bias.double()).float()


def cut_off(numbers: Tensor, largest: Tensor | None = None) -> Tensor:
    """Numbers towards zero, to what 24 bits hold from the first one of the largest on."""
    _, exponent = (numbers if largest is None else largest).frexp()
    one = torch.ldexp(torch.ones_like(numbers), exponent - 24)
    return torch.trunc(numbers / one) * one


def cut_off_below(generator: torch.Generator) -> Case:
    """Both on their grids, and small products that are lost one by one beside a large sum."""
    width, large = 4096, 272
    x, weight = torch.full((2, width), 15.0), torch.full((20, width), -1.0)
    x[:, :large], weight[:, :large] = most_of(width), -127.0
    lost = 15.0 * (width - large)
    zero = -(x.double() @ weight.double().T)[0]
    return x, weight, (zero - 0.98 * lost).float()


def test_what_tensor_cores_cut_off_is_allowed_for() -> None:
    x, weight, bias = cut_off_below(torch.Generator())
    x, weight = x.bfloat16(), weight.bfloat16()
    assert x[0, 0] == most_of(4096)
    p = x.double() @ weight.double().T + bias.double()
    size = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    unit = 4096 * 2.0**-24 * size
    screen = screen_of(weight, bias)
    for at_once in (4, 8, 16):
        computed = on_tensor_cores(x, weight, bias, at_once)
        assert (computed > 0).all()
        assert ((computed - p) > 1.6 * unit).all()  # more than any sum of float32 loses
        assert ((computed - p) < 4 * unit).all()
    assert (active_somewhere(x.float(), weight.float(), bias) == (p > 0)).all()
    assert not (p > 0).any()
    assert candidates_of(x, weight, screen).all()
    # What a float32 sum needs would not do.
    of_float32 = Screen(screen.words, screen.bounds.clone())
    of_float32.bounds[1] -= 3 * 4096 * 2.0**-24 * screen.bounds[2]
    of_float32.bounds[3] -= 2 * 4096 * 2.0**-24 * bias.abs()
    assert not candidates_of(x, weight, of_float32).any()


@pytest.mark.parametrize("at_once", [4, 8, 16])
@pytest.mark.parametrize("make", ALL_CASES[:9], ids=lambda make: make.__name__)
def test_none_that_tensor_cores_have_active_is_missed(make: Make, at_once: int) -> None:
    x, weight, bias = make(torch.Generator().manual_seed(1))
    x, weight = x[:CASE_TOKENS].bfloat16(), weight.bfloat16()
    if make.__name__ not in ("gaussian", "along_residual"):  # ties, after rounding to bfloat16
        exact = (x.double()[:, None] * weight.double()).sum(-1)
        bias = -exact[torch.arange(len(weight)) % len(x), torch.arange(len(weight))].float()
    active = ~(on_tensor_cores(x, weight, bias, at_once) <= 0)
    assert not (active.any(0) & ~candidates_of(x, weight, screen_of(weight, bias))).any()


def test_it_is_the_op_for_one_token_too() -> None:
    torch.manual_seed(0)
    for tokens, gated in ((3, False), (1, True)):
        *block, up, up_bias = block_of(tokens, 64, 32, 0.1, gated=gated)
        screen = screen_of(block[1], block[2])
        arguments = (*block, *screen, 1.0, 0.5, up, up_bias)
        torch.library.opcheck(torch.ops.steppe.decode_token.default, arguments)
        z = decode_token(*block, screen, 1.0, 0.5, up, up_bias)
        wanted = expected((*block, up, up_bias), 1.0, 0.5)
        assert torch.dist(z.double(), wanted) <= TOLERANCES[torch.float32] * wanted.norm()


def test_a_gate_without_biases_is_one_with_zeros() -> None:
    torch.manual_seed(0)
    *block, up, up_bias = block_of(2, 64, 32, 0.1, gated=True)
    z = decode_token(*block, None, 1.0, 0.5, up)
    assert torch.equal(z, decode_token(*block, None, 1.0, 0.5, up, torch.zeros_like(up_bias)))


def test_what_it_cannot_take_is_refused() -> None:
    *block, up, up_bias = block_of(MOST_TOKENS, 64, 32, 0.1, gated=True)
    x, *weights = block
    assert decode_token(x, *weights, None).shape == x.shape
    with pytest.raises(KernelError, match="T from 1 to 16"):
        decode_token(torch.cat([x, x[:1]]), *weights, None)
    with pytest.raises(KernelError, match="T from 1 to 16"):
        decode_token(x[:0], *weights, None)
    with pytest.raises(KernelError, match="up: expected"):
        decode_token(*block, None, 1.0, 0.0, up[:3])
    with pytest.raises(KernelError, match="up_bias: expected"):
        decode_token(*block, None, 1.0, 0.0, up, up_bias.half())
    with pytest.raises(KernelError, match="as up is None"):
        decode_token(*block, None, 1.0, 0.0, None, up_bias)
