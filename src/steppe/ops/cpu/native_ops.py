"""The native kernels of the ops, for float32 and bfloat16 on the CPU; else the reference runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steppe.ops import mlp as mlp_op
from steppe.ops import products, reference
from steppe.ops.cpu import calls, memory
from steppe.ops.cpu.calls import DECODE_ROWS, Support
from steppe.ops.cpu.copies import keeps, kept_panels, kept_screen
from steppe.ops.cpu.decode import FewBlock, why_not_laid_out
from steppe.ops.cpu.dispatch import MARGIN, max_candidates_for, max_density_for
from steppe.ops.cpu.library import load
from steppe.ops.cpu.screen import (
    MAX_WIDTH,
    Candidates,
    compact_product,
    find_candidates,
    sample,
    screen_of,
)
from steppe.ops.mlp import Seven, no_list, only_needed, rule_of
from steppe.ops.outcome import DENSE, SCREENED, SPARSE, Outcome, note
from steppe.ops.plan import Limits, Plan, Saved
from steppe.ops.reference import Rule, Weights

_LEAST_WIDTH = 256  # of narrower blocks all is done so soon that screening gains little or nothing
_UNITS_SAMPLED = 32  # one unit in so many is looked at first


def runs(*tensors: Tensor | None) -> bool:
    """Whether the native kernels are there and take these tensors, which are of one dtype."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = given[0].dtype
    return (
        load() is not None
        and dtype in calls.DTYPES
        and all(tensor.dtype == dtype for tensor in given)
    )


def screen_limit(
    rows: int, width: int, dtype: torch.dtype, trains: bool, asked: float | None
) -> float:
    """Up to which share of candidates the first product of a call is screened.

    Args:
        rows: tokens of the call.
        width: d_model of the block.
        dtype: of the block.
        trains: whether a backward pass follows.
        asked: what the user wants; None for what was measured on this machine.

    Returns:
        A share; 0 for never.
    """
    if not rows or width >= MAX_WIDTH:
        return 0.0
    if asked is not None:
        return asked
    return max_candidates_for(rows, dtype, trains) if width >= _LEAST_WIDTH else 0.0


def plan_for(rows: int, width: int, dtype: torch.dtype, trains: bool, asked: Limits) -> Plan:
    """The limits of a call, those of this machine where nothing was asked for.

    Args:
        rows: as of `screen_limit`, as the next three.
        width: likewise.
        dtype: likewise.
        trains: likewise.
        asked: what the user wants.
    """
    most, share = asked
    limit = max_density_for(rows, width, dtype, trains) if most is None else most
    screened = screen_limit(rows, width, dtype, trains, share)
    return Plan("", limit, screened, most is None, share is None)


@products.compact.register_kernel("cpu")
def _(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not runs(p):
        return reference.compact(p)
    listed = calls.compact(p.contiguous())
    assert listed is not None  # of any density
    values, support = listed
    return values, support.index, support.offsets


@products.spmm.register_kernel("cpu")
def _(values: Tensor, index: Tensor, offsets: Tensor, rows: int, matrix: Tensor) -> Tensor:
    if not runs(values, matrix):
        return reference.spmm(values, index, offsets, rows, matrix)
    support = Support(index, offsets, rows, matrix.shape[0])
    return calls.spmm(values.contiguous(), support, matrix)


@products.spmm_t.register_kernel("cpu")
def _(values: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, columns: int) -> Tensor:
    if not runs(values, matrix):
        return reference.spmm_t(values, index, offsets, matrix, columns)
    support = Support(index, offsets, matrix.shape[0], columns)
    turned, (turned_values,) = calls.transpose(support, values.contiguous())
    return calls.spmm(turned_values, turned, matrix)


@products.sampled.register_kernel("cpu")
def _(index: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if not runs(left, right):
        return reference.sampled(index, offsets, left, right)
    support = Support(index, offsets, left.shape[0], right.shape[0])
    return calls.sampled(support, calls.pack(left), right)


@mlp_op.mlp.register_kernel("cpu")
def mlp(
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    dropout: float,
    trains: bool,
    max_density: float | None,
    max_candidates: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `steppe.ops.mlp.mlp`."""
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    rows, width = x.shape
    plan = plan_for(rows, width, x.dtype, trains, Limits(max_density, max_candidates))
    return compute(x, weights, rule_of(alpha, beta, mix, dropout), plan, trains)


def compute(x: Tensor, weights: Weights, rule: Rule, plan: Plan, trains: bool) -> Saved:
    """A block by its plan, for `steppe.ops.mlp.mlp`.

    Args:
        x: ``[T, D]``.
        weights: of the block.
        rule: activation and dropout.
        plan: the limits.
        trains: whether a backward pass follows.
    """
    if not runs(x, *weights):
        return Saved(*reference.mlp(x, weights, rule), *no_list(x.device))
    activated, activated_bias, up, up_bias, down, down_bias = weights
    rows, columns = x.shape[0], down.shape[0]
    check_shapes(x, weights)
    most, share = plan.max_density, plan.max_candidates
    # Where no copies may be kept, all is made in each call, as in training.
    makes_all = trains or not all([keeps(activated), keeps(down)])
    if makes_all and not trains and plan.is_measured:
        most = max_density_for(rows, x.shape[1], x.dtype, trains=True)
    if makes_all and not trains and plan.screen_is_measured:
        share = screen_limit(rows, x.shape[1], x.dtype, True, None)
    if most <= 0.0 or not down.numel():
        note(Outcome(DENSE, rows, trains=trains, reason=f"at {rows} tokens no density gains"))
        return Saved(*reference.mlp(x, weights, rule), *no_list(x.device))
    is_few = rows <= DECODE_ROWS and not trains and not rule.dropout
    unlaid = why_not_laid_out(weights) if is_few else ""
    if is_few and not unlaid:
        return Saved(*_decode(x.contiguous(), weights, rule, most, share), *no_list(x.device))
    if is_few and plan.is_measured:  # packing a weight anew takes longer than a dense call
        note(Outcome(DENSE, rows, trains=trains, reason=unlaid))
        return Saved(*reference.mlp(x, weights, rule), *no_list(x.device))
    found = panels_x = None
    if share > 0.0:
        find = _find_anew if makes_all else _find_by_habit
        tokens = x if calls.rows_are_contiguous(x) else x.contiguous()
        found = find(tokens, activated, activated_bias, share)
    if found is None:
        p = reference.linear(x, activated, activated_bias, memory.scratch("p", (rows, columns), x))
        listed = calls.compact(p, most)
        if listed is None:
            note(Outcome(DENSE, rows, trains=trains, reason=_too_many(most), is_too_dense=True))
            return Saved(*reference.mlp_from(p, x, weights, rule), *no_list(x.device))
    else:
        panels_x = calls.pack(x, "x")
        listed = compact_product(panels_x, _gathered(activated, makes_all), activated_bias, found)
        if listed[1].entries > most * rows * columns:
            density, reason = listed[1].entries / (rows * columns), _too_many(most)
            note(Outcome(DENSE, rows, density, found.share, trains, False, reason, True))
            return Saved(*reference.mlp(x, weights, rule), *no_list(x.device))
    r, support = listed
    up_values = r.new_empty(0)
    if up is not None:
        panels_x = panels_x or calls.pack(x, "x")
        up_values = calls.sampled(support, panels_x, _gathered(up, makes_all), up_bias)
    kept = rule.draw_kept(r)
    hidden = rule.hidden(r, up_values, kept)
    z = calls.spmm(hidden, support, _gathered(down, makes_all), down_bias)
    density = support.entries / max(rows * columns, 1)
    how, share = (SPARSE, math.nan) if found is None else (SCREENED, found.share)
    note(Outcome(how, rows, density, share, trains))
    return Saved(z, r, up_values, kept, support.index, support.offsets)


def check_shapes(x: Tensor, weights: Weights) -> None:
    """Refuse tensors that do not go together, before a kernel reads past one of them."""
    hidden, width = weights.down.shape[0], x.shape[1]
    for name, shape in (
        ("activated", (hidden, width)),
        ("activated_bias", (hidden,)),
        ("up", (hidden, width)),
        ("up_bias", (hidden,)),
    ):
        weight = getattr(weights, name)
        if weight is not None and weight.shape != shape:
            calls.refuse(f"{name} of shape {shape}, got {tuple(weight.shape)}")


def _too_many(most: float) -> str:
    return f"more than {most:.0%} of the entries are active"


def _gathered(weight: Tensor, makes_all: bool) -> calls.Panels | Tensor:
    """What the kernels gather a weight's rows from: panels that may be kept, else the weight."""
    kept = None if makes_all else kept_panels(weight)
    return weight if kept is None else kept


def _find_anew(x: Tensor, weight: Tensor, bias: Tensor | None, share: float) -> Candidates | None:
    """The candidates of a weight that is about to change, after a look at some tokens and units.

    It goes by x and the weight alone: a forward pass that checkpointing repeats must come to the
    same list.
    """
    some = screen_of(weight[::_UNITS_SAMPLED], "weight")
    some_bias = None if bias is None else bias[::_UNITS_SAMPLED].contiguous()
    if find_candidates(sample(x), some, some_bias, share) is None:
        return None
    return find_candidates(x, screen_of(weight, "weight"), bias, share + MARGIN)


def _find_by_habit(
    x: Tensor, weight: Tensor, bias: Tensor | None, share: float
) -> Candidates | None:
    """The candidates of a weight that stays, after a look at some tokens if it was too many."""
    kept = kept_screen(weight)
    if kept is None:
        return None
    screen, _, habit = kept
    limit = habit.limit(share)
    if limit <= 0.0:
        return None
    found = None
    if habit.held or find_candidates(sample(x), screen, bias, limit) is not None:
        found = find_candidates(x, screen, bias, limit)
    habit.note(math.nan if found is None else found.share, found is not None)
    return found


def _decode(
    x: Tensor, weights: Weights, rule: Rule, most: float, share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A block on few rows: what takes time is to read the weights, each once."""
    rows, columns = x.shape[0], weights.down.shape[0]
    up_shape = (rows, columns) if weights.up is not None else (0,)
    outputs = z, r, up_values = (
        torch.empty_like(x),
        x.new_empty(rows, columns),
        x.new_empty(up_shape),
    )
    block = FewBlock(weights, screens=share > 0.0, stays=False)
    if not block.run(x, (rule.alpha, float(rule.beta)), most, share, outputs):
        return reference.mlp_from(r, x, weights, rule)
    return z, r.flatten(), up_values.flatten(), rule.draw_kept(x)


@mlp_op.mlp_backward.register_kernel("cpu")
def _(
    grad_z: Tensor,
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    dropout: float,
    r: Tensor,
    up_values: Tensor,
    kept: Tensor,
    index: Tensor,
    offsets: Tensor,
    needs: Sequence[bool],
) -> Seven:
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    rule = rule_of(alpha, beta, mix, dropout)
    if not offsets.numel() or not runs(grad_z, x, *weights):
        return mlp_op.reference_backward(
            grad_z, x, weights, rule, r, up_values, kept, index, offsets, needs
        )
    support = Support(index, offsets, x.shape[0], down.shape[0])
    grads = _sparse_gradients(grad_z, x, weights, rule, r, up_values, kept, support, needs)
    return only_needed(grads, (x, *weights), needs)


def _sparse_gradients(
    grad_z: Tensor,
    x: Tensor,
    weights: Weights,
    rule: Rule,
    r: Tensor,
    up_values: Tensor,
    kept: Tensor,
    support: Support,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of the weights, where they are needed."""
    needs_x, needs_activated, needs_activated_bias, needs_up, needs_up_bias, needs_down, _ = needs
    panels_g = calls.pack(grad_z, "gradient")
    grad_hidden = calls.sampled(support, panels_g, weights.down)
    hidden = rule.hidden(r, up_values, kept)
    grad_p, grad_up = rule.split(grad_hidden, r, up_values, kept)
    del grad_hidden

    turned, (hidden_t, grad_p_t) = calls.transpose(support, hidden, grad_p)
    grads: list[Tensor | None] = [None] * 7
    if needs_down:
        grads[5] = calls.spmm_into(torch.empty_like(weights.down), hidden_t, turned, panels_g)
    if needs_activated:
        grads[1] = calls.spmm_into(torch.empty_like(weights.activated), grad_p_t, turned, x)
    if needs_activated_bias:
        grads[2] = calls.row_sums(grad_p_t, turned)
    if needs[6]:
        grads[6] = grad_z.sum(0)
    if needs_x:
        grads[0] = calls.spmm(grad_p, support, weights.activated)
    if weights.up is None or grad_up is None:
        return grads

    turned, (grad_up_t,) = calls.transpose(support, grad_up)
    if needs_up:
        grads[3] = calls.spmm_into(torch.empty_like(weights.up), grad_up_t, turned, x)
    if needs_up_bias:
        grads[4] = calls.row_sums(grad_up_t, turned)
    if grads[0] is not None:
        calls.spmm_into(grads[0], grad_up, support, weights.up, accumulate=True)
    return grads
