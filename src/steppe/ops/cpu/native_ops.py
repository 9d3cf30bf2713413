"""The native kernels of a whole block, float32 and bfloat16 on the CPU; else the reference runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steppe.ops import mlp as mlp_op
from steppe.ops import reference
from steppe.ops.cpu import calls, memory
from steppe.ops.cpu.back_off import MARGIN
from steppe.ops.cpu.calls import DECODE_ROWS, Support
from steppe.ops.cpu.copies import cached_panels, cached_screen, is_cacheable
from steppe.ops.cpu.decode import DecodeBlock, why_not_laid_out
from steppe.ops.cpu.dispatch import max_candidates_for, max_density_for
from steppe.ops.cpu.gradients import sparse_gradients
from steppe.ops.cpu.product_kernels import runs
from steppe.ops.cpu.saved import Saved, fake_saved, saved_dense, saved_sparse
from steppe.ops.cpu.scalar import read_scalar
from steppe.ops.cpu.screen import (
    MAX_WIDTH,
    Candidates,
    compact_product,
    find_candidates,
    sample,
    screen_of,
)
from steppe.ops.mlp import Seven, only_needed
from steppe.ops.outcome import DENSE, SCREENED, SPARSE, Outcome, note
from steppe.ops.plan import Limits, Plan
from steppe.ops.reference import Rule, Weights

_LEAST_WIDTH = 256  # narrower blocks are done so soon that screening gains little or nothing
_UNITS_SAMPLED = 32  # one unit in so many is looked at first


def rule_of(alpha: float, beta: float, mix: Tensor | None, dropout: float) -> Rule:
    """The rule that an op's arguments describe, with a number for β; no op reads `mix`."""
    return Rule(alpha, beta if mix is None else beta * read_scalar(mix), dropout)


def screen_limit(
    rows: int, width: int, dtype: torch.dtype, trains: bool, asked: float | None
) -> float:
    """The largest share of candidates at which the first product of a call is screened.

    Args:
        rows: tokens of the call.
        width: d_model of the block.
        dtype: of the block.
        trains: whether a backward pass follows.
        asked: the user's limit; None for the measured threshold.

    Returns:
        A share in [0, 1]; 0 for never.
    """
    if not rows or width >= MAX_WIDTH:
        return 0.0
    if asked is not None:
        return asked
    return max_candidates_for(rows, dtype, trains) if width >= _LEAST_WIDTH else 0.0


def plan_for(rows: int, width: int, dtype: torch.dtype, trains: bool, asked: Limits) -> Plan:
    """The limits of a call: the user's, else those measured on this machine.

    Args:
        rows: as of `screen_limit`; so the next three.
        width: d_model of the block.
        dtype: of the block.
        trains: whether a backward pass follows.
        asked: the user's limits.
    """
    most, share = asked
    limit = max_density_for(rows, width, dtype, trains) if most is None else most
    screened = screen_limit(rows, width, dtype, trains, share)
    return Plan("", limit, screened, most is None, share is None)


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
    with_l1: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `steppe.ops.mlp.mlp`."""
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    rows, width = x.shape
    plan = plan_for(rows, width, x.dtype, trains, Limits(max_density, max_candidates))
    rule = rule_of(alpha, beta, mix, dropout)
    z, saved = compute(x, weights, rule, plan, trains)
    l1 = l1_of(saved, rule, rows, len(down)) if with_l1 else mlp_op.no_l1(x)
    return z, l1, *saved


def l1_of(saved: Saved, rule: Rule, rows: int, columns: int) -> Tensor:
    """Σ|a| of each token, before dropout, ``[T]``, float32 or wider.

    Args:
        saved: of a forward pass.
        rule: the activation.
        rows: T.
        columns: F.
    """
    if not saved.is_sparse:
        return reference.l1(saved.r, saved.up, rule, rows)
    hidden = rule.before_dropout(saved.r, saved.up)
    # Without a gate no entry is negative.
    sizes = hidden.abs() if saved.up.numel() else hidden
    wide = sizes.to(torch.promote_types(sizes.dtype, torch.float32))
    return calls.row_sums(wide, Support(saved.indices, saved.offsets, rows, columns))


def compute(
    x: Tensor, weights: Weights, rule: Rule, plan: Plan, trains: bool
) -> tuple[Tensor, Saved]:
    """A block by its plan, for `steppe.ops.mlp.mlp`.

    Args:
        x: ``[T, D]``.
        weights: of the block.
        rule: activation and dropout.
        plan: the limits.
        trains: whether a backward pass follows.

    Returns:
        z ``[T, D]``, and what the backward pass needs.
    """
    if not runs(x, *weights):
        return _dense(x, weights, rule)
    rows, columns = x.shape[0], weights.down.shape[0]
    check_shapes(x, weights)
    # Where no copies of the weights may be cached, each call packs them, as in training.
    packs = trains or not all([is_cacheable(weights.activated), is_cacheable(weights.down)])
    most, share = _limits_of(plan, x, packs, trains)
    if most <= 0.0 or not weights.down.numel():
        note(Outcome(DENSE, rows, trains=trains, reason=f"at {rows} tokens no density gains"))
        return _dense(x, weights, rule)
    if rows <= DECODE_ROWS and not trains and not rule.dropout:
        unlaid = why_not_laid_out(weights)
        if not unlaid:
            return _decode(x.contiguous(), weights, rule, most, share)
        if plan.is_measured:  # to pack a weight takes longer than a dense call
            note(Outcome(DENSE, rows, trains=trains, reason=unlaid))
            return _dense(x, weights, rule)
    found = _find(x, weights.activated, weights.activated_bias, share, packs)
    if found is None:
        to = memory.scratch("p", (rows, columns), x)
        p = reference.linear(x, weights.activated, weights.activated_bias, to)
        active = calls.compact(p, most)
        if active is None:
            note(Outcome(DENSE, rows, trains=trains, reason=_too_many(most), is_too_dense=True))
            return _dense_from(p, x, weights, rule)
        return _sparse(x, weights, rule, *active, None, math.nan, packs, trains)
    panels_x = calls.pack(x, "x")
    gathered = _gathered(weights.activated, packs)
    active = compact_product(panels_x, gathered, weights.activated_bias, found)
    if active[1].entries > most * rows * columns:
        density, reason = active[1].entries / (rows * columns), _too_many(most)
        note(Outcome(DENSE, rows, density, found.share, trains, False, reason, True))
        return _dense(x, weights, rule)
    return _sparse(x, weights, rule, *active, panels_x, found.share, packs, trains)


def _limits_of(plan: Plan, x: Tensor, packs: bool, trains: bool) -> tuple[float, float]:
    """The limits of a call, which are those of training where each call packs the weights."""
    most, share = plan.max_density, plan.max_candidates
    if packs and not trains:
        rows, width = x.shape
        if plan.is_measured:
            most = max_density_for(rows, width, x.dtype, trains=True)
        if plan.screen_is_measured:
            share = screen_limit(rows, width, x.dtype, True, None)
    return most, share


def _dense(x: Tensor, weights: Weights, rule: Rule) -> tuple[Tensor, Saved]:
    """A block by dense products."""
    z, *parts = reference.mlp(x, weights, rule)
    return z, saved_dense(*parts)


def _dense_from(p: Tensor, x: Tensor, weights: Weights, rule: Rule) -> tuple[Tensor, Saved]:
    """The same from the pre-activations ``[T, F]``."""
    z, *parts = reference.mlp_from(p, x, weights, rule)
    return z, saved_dense(*parts)


def _sparse(
    x: Tensor,
    weights: Weights,
    rule: Rule,
    r: Tensor,
    support: Support,
    panels_x: calls.Panels | None,
    candidates: float,
    packs: bool,
    trains: bool,
) -> tuple[Tensor, Saved]:
    """The rest of a block, from r on its support; `candidates` is NaN if it was not screened."""
    up_values = r.new_empty(0)
    if weights.up is not None:
        panels_x = panels_x or calls.pack(x, "x")
        up_values = calls.sampled(support, panels_x, _gathered(weights.up, packs), weights.up_bias)
    kept = rule.draw_kept(r)
    hidden = rule.hidden(r, up_values, kept)
    z = calls.spmm(hidden, support, _gathered(weights.down, packs), weights.down_bias)
    density = support.entries / max(support.rows * support.columns, 1)
    how = SPARSE if math.isnan(candidates) else SCREENED
    note(Outcome(how, support.rows, density, candidates, trains))
    return z, saved_sparse(r, up_values, kept, support)


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


def _gathered(weight: Tensor, packs: bool) -> calls.Panels | Tensor:
    """A weight as the kernels gather its rows: its cached panels, else the weight itself."""
    kept = None if packs else cached_panels(weight)
    return weight if kept is None else kept


def _find(
    x: Tensor, weight: Tensor, bias: Tensor | None, share: float, packs: bool
) -> Candidates | None:
    """The candidates of a first product; None where it is not screened, or they are too many."""
    if share <= 0.0:
        return None
    find = _find_uncached if packs else _find_and_record
    return find(x if calls.rows_are_contiguous(x) else x.contiguous(), weight, bias, share)


def _find_uncached(
    x: Tensor, weight: Tensor, bias: Tensor | None, share: float
) -> Candidates | None:
    """The candidates of a weight that is about to change, after a look at some tokens and units.

    No back-off here: a forward pass that checkpointing repeats has to save the same support, so
    the decision may depend on x and the weight alone.
    """
    some = screen_of(weight[::_UNITS_SAMPLED], "weight")
    some_bias = None if bias is None else bias[::_UNITS_SAMPLED].contiguous()
    if find_candidates(sample(x), some, some_bias, share) is None:
        return None
    return find_candidates(x, screen_of(weight, "weight"), bias, share + MARGIN)


def _find_and_record(
    x: Tensor, weight: Tensor, bias: Tensor | None, share: float
) -> Candidates | None:
    """The candidates of a weight that stays; counts the call in the back-off of its screen.

    After a try that found too many, the next one looks at some tokens first.
    """
    kept = cached_screen(weight)
    if kept is None:
        return None
    back_off = kept.many
    limit = back_off.limit_and_count(share)
    if limit <= 0.0:
        return None
    found = None
    if back_off.held or find_candidates(sample(x), kept.screen, bias, limit) is not None:
        found = find_candidates(x, kept.screen, bias, limit)
    back_off.record(math.nan if found is None else found.share, found is not None)
    return found


def _decode(
    x: Tensor, weights: Weights, rule: Rule, most: float, share: float
) -> tuple[Tensor, Saved]:
    """A block on few tokens in one native call: reading the weights once is what takes the time."""
    rows, columns = x.shape[0], weights.down.shape[0]
    z, r = torch.empty_like(x), x.new_empty(rows, columns)
    up_values = x.new_empty((rows, columns) if weights.up is not None else (0,))
    block = DecodeBlock(weights, screens=share > 0.0, stays=False)
    if not block.run(x, (rule.alpha, float(rule.beta)), most, share, (z, r, up_values)):
        return _dense_from(r, x, weights, rule)
    return z, saved_dense(r.flatten(), up_values.flatten(), rule.draw_kept(x))


@mlp_op.mlp_backward.register_kernel("cpu")
def _(
    grad_z: Tensor,
    grad_l1: Tensor | None,
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
    saved_0: Tensor,
    saved_1: Tensor,
    saved_2: Tensor,
    saved_3: Tensor,
    saved_4: Tensor,
    needs: Sequence[bool],
) -> Seven:
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    rule = rule_of(alpha, beta, mix, dropout)
    form = Saved(saved_0, saved_1, saved_2, saved_3, saved_4)
    rows, columns = x.shape[0], down.shape[0]
    if form.is_sparse and runs(grad_z, x, *weights):
        grads = sparse_gradients(grad_z, grad_l1, x, weights, rule, form, needs)
        return only_needed(grads, (x, *weights), needs)
    r = form.dense(form.r, rows, columns)
    up_values = form.up if up is None else form.dense(form.up, rows, columns)
    kept = form.dense(form.kept, rows, columns) if dropout else form.kept
    return mlp_op.dense_backward(grad_z, grad_l1, x, weights, rule, r, up_values, kept, needs)


@mlp_op.support.register_kernel("cpu")
def _(
    saved: Sequence[Tensor],
    rows: int,
    columns: int,
    alpha: float,
    beta: float,
    mix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    form = Saved(*saved)
    active, slopes = mlp_op.support_of(form.r, form.up, rule_of(alpha, beta, mix, 0.0))
    active, slopes = form.dense(active, rows, columns), form.dense(slopes, rows, columns)
    return active.view(rows, columns), slopes.view(rows, columns)


@mlp_op.dropout_mask.register_kernel("cpu")
def _(saved: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    form = Saved(*saved)
    kept = form.dense(form.kept, rows, columns)
    return kept if form.is_sparse else kept.clone()


mlp_op.declare_saved("cpu", fake_saved)
