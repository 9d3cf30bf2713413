"""Every sparse op in plain torch: the definition, and what runs where no kernel does.

A matrix ``[T, F]`` that is mostly zero stands as a list of its entries: their `values` ``[nnz]``,
and its support, `index` and `offsets`. The columns are cut into equal tiles, a multiple of
`TILE_UNIT` wide; the entries are sorted by tile, then row, then column. `index` ``[nnz]``, int16,
is the column within its tile; the entries of row t in tile j are those from ``offsets[j · T + t]``
up to ``offsets[j · T + t + 1]``, int64 ``[tiles · T + 1]``. The width of the tiles follows from how
many there are. Kernels choose the tiles; every op takes any.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE_UNIT = 64
MAX_TILE = 32704  # columns; the largest multiple of the unit that int16 can count


def tile_of(offsets: Tensor, rows: int, columns: int) -> int:
    """Width of the tiles of a support.

    Args:
        offsets: int64 ``[tiles · T + 1]``.
        rows: T.
        columns: F.

    Returns:
        Columns per tile; the last one may be narrower.
    """
    tiles = (offsets.shape[0] - 1) // rows if rows else 1
    return TILE_UNIT * ceil_div(ceil_div(columns, TILE_UNIT), max(tiles, 1))


def ceil_div(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)


def compact(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of ``max(p, 0)`` that are not zero; NaN is kept, as ReLU keeps it.

    Args:
        p: ``[T, F]``, floating point.

    Returns:
        `values`, in p's dtype, `index` and `offsets`.
    """
    rows, columns = p.shape
    tiles = max(ceil_div(columns, MAX_TILE), 1)
    tile = TILE_UNIT * ceil_div(ceil_div(columns, TILE_UNIT), tiles)
    values, index, counts = [], [], []
    for start in range(0, max(columns, 1), max(tile, 1)):
        part = p[:, start : start + tile]
        row, column = (~(part <= 0)).nonzero(as_tuple=True)
        values.append(part[row, column])
        index.append(column.to(torch.int16))
        counts.append(torch.bincount(row, minlength=rows))
    offsets = torch.zeros(len(counts) * rows + 1, dtype=torch.int64, device=p.device)
    offsets[1:] = torch.cat(counts).cumsum(0)
    return torch.cat(values), torch.cat(index), offsets


def positions(index: Tensor, offsets: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where each entry of a list stands.

    Args:
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        rows: T.
        columns: F.

    Returns:
        Its row and its column, int64 ``[nnz]`` each.
    """
    lists = torch.arange(offsets.shape[0] - 1, device=index.device)
    place = torch.repeat_interleave(lists, offsets.diff(), output_size=index.shape[0])
    tile = tile_of(offsets, rows, columns)
    return place % max(rows, 1), place // max(rows, 1) * tile + index


def densify(values: Tensor, index: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix that a list stands for.

    Args:
        values: ``[nnz]``.
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        rows: T.
        columns: F.

    Returns:
        ``[T, F]``, dtype of the values.
    """
    dense = values.new_zeros(rows, columns)
    dense[positions(index, offsets, rows, columns)] = values
    return dense


def spmm(values: Tensor, index: Tensor, offsets: Tensor, rows: int, matrix: Tensor) -> Tensor:
    """Sparse × dense: ``A M`` with A given as a list.

    Args:
        values: ``[nnz]``.
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        rows: T.
        matrix: M, ``[F, D]``, dtype of the values.

    Returns:
        ``[T, D]``, dtype of the values.
    """
    return densify(values, index, offsets, rows, matrix.shape[0]) @ matrix


def spmm_t(values: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, columns: int) -> Tensor:
    """Transposed sparse × dense, a weight's gradient: ``Aᵀ G`` with A given as a list.

    Args:
        values: ``[nnz]``.
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        matrix: G, ``[T, D]``, dtype of the values.
        columns: F.

    Returns:
        ``[F, D]``, dtype of the values.
    """
    return densify(values, index, offsets, matrix.shape[0], columns).T @ matrix


def sddmm(index: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Sampled product: the entries of ``G Mᵀ`` on a support.

    Args:
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        left: G, ``[T, D]``.
        right: M, ``[F, D]``, dtype of G.

    Returns:
        Values ``[nnz]``, dtype of G.
    """
    return (left @ right.T)[positions(index, offsets, left.shape[0], right.shape[0])]


class Weights(NamedTuple):
    """The parameters of an MLP block, or their gradients.

    Attributes:
        activated: ``[F, D]``, of the layer whose output the activation reads: `gate` of a gated
            block, else `up`.
        activated_bias: ``[F]``.
        up: ``[F, D]`` of a gated block, else None.
        up_bias: ``[F]``.
        down: ``[F, D]``; rows are what a unit adds to the output.
        down_bias: ``[D]``.
    """

    activated: Tensor
    activated_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Rule(NamedTuple):
    """What happens between the two products: σ(p) = α r + β r² and dropout.

    Attributes:
        alpha: α ≥ 0.
        beta: β ≥ 0; a 0-dim tensor on another device than the CPU, where reading it would wait.
        dropout: probability that a hidden entry is dropped.
    """

    alpha: float
    beta: float | Tensor
    dropout: float

    @property
    def is_linear(self) -> bool:
        """Whether β is known to be 0."""
        return not isinstance(self.beta, Tensor) and self.beta == 0.0

    def activation(self, r: Tensor) -> Tensor:
        """σ from r = max(p, 0)."""
        is_relu = self.is_linear and self.alpha == 1.0
        return r if is_relu else r * (self.alpha + self.beta * r)

    def slope(self, r: Tensor) -> Tensor | float:
        """σ′ from r, where r ≠ 0; a number where it is the same for all."""
        return self.alpha if self.is_linear else self.alpha + 2.0 * self.beta * r

    def draw_kept(self, like: Tensor) -> Tensor:
        """Which entries dropout keeps, bool; empty without dropout."""
        count = like.numel() if self.dropout else 0
        kept = torch.empty(count, dtype=torch.bool, device=like.device)
        return kept.bernoulli_(1.0 - self.dropout)

    def drop(self, values: Tensor, kept: Tensor) -> Tensor:
        """Values after dropout, or gradients before it."""
        if not self.dropout:
            return values
        return values * kept / (1.0 - self.dropout) if self.dropout < 1 else values * 0.0

    def hidden(self, r: Tensor, up: Tensor, kept: Tensor) -> Tensor:
        """What `down` reads: σ(r), times `up` in a gated block, after dropout."""
        a = self.activation(r)
        return self.drop(a * up if up.numel() else a, kept)

    def split(
        self, grad_hidden: Tensor, r: Tensor, up: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """From the gradient of what `down` reads to those of p and of a gated block's `up`.

        They hold where r ≠ 0; elsewhere both are 0.
        """
        grad_a = self.drop(grad_hidden, kept)
        if r.numel() and not up.numel():
            return self._times_slope(grad_a, r), None
        return self._times_slope(grad_a * up, r), grad_a * self.activation(r)

    def _times_slope(self, grad: Tensor, r: Tensor) -> Tensor:
        slope = self.slope(r)
        return grad if isinstance(slope, float) and slope == 1.0 else grad * slope


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``x Wᵀ + bias``, the same bits as ``nn.Linear``.

    Args:
        x: ``[T, D]``.
        weight: W, ``[F, D]``.
        bias: ``[F]``.
        out: ``[T, F]`` to write to.

    Returns:
        ``[T, F]``.
    """
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def transposed_product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """``leftᵀ right``, laid out as a matrix of its shape is, whichever of its dimensions is last.

    Args:
        left: ``[T, F]``.
        right: ``[T, D]``.
        like: ``[F, D]``.

    Returns:
        ``[F, D]``.
    """
    return (right.T @ left).T if like.stride(0) == 1 else left.T @ right


def mlp(x: Tensor, weights: Weights, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An MLP block, dense.

    Args:
        x: ``[T, D]``.
        weights: in x's dtype.
        rule: activation and dropout.

    Returns:
        z ``[T, D]``; r = max(p, 0) ``[T · F]``; what multiplies σ(r) in a gated block, likewise, or
        empty; which entries dropout keeps, bool, likewise, or empty.
    """
    return mlp_from(linear(x, weights.activated, weights.activated_bias), x, weights, rule)


def mlp_from(
    p: Tensor, x: Tensor, weights: Weights, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from the pre-activations ``[T, F]``."""
    r = torch.relu(p).flatten()
    up = r.new_empty(0)
    if weights.up is not None:
        up = linear(x, weights.up, weights.up_bias).flatten()
    kept = rule.draw_kept(r)
    hidden = rule.hidden(r, up, kept).view_as(p)
    z = linear(hidden, weights.down.T, weights.down_bias)
    return z, r, up, kept


def mlp_backward(
    grad_z: Tensor,
    x: Tensor,
    weights: Weights,
    rule: Rule,
    r: Tensor,
    up: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Weights]:
    """The gradients of `mlp`, dense.

    Args:
        grad_z: ``[T, D]``.
        x: ``[T, D]``.
        weights: of the block.
        rule: activation and dropout.
        r: ``[T · F]``, as `mlp` gave it.
        up: likewise.
        kept: likewise.

    Returns:
        The gradients of x and of the weights; None where there is no weight.
    """
    rows, columns = x.shape[0], weights.down.shape[0]
    hidden = rule.hidden(r, up, kept).view(rows, columns)
    grad_down = transposed_product(hidden, grad_z, weights.down)
    grad_p, grad_up = rule.split((grad_z @ weights.down.T).flatten(), r, up, kept)
    grad_p = torch.ops.aten.threshold_backward(grad_p, r, 0).view(rows, columns)
    grad_x = grad_p @ weights.activated
    grad_up_weight = grad_up_bias = None
    if weights.up is not None and grad_up is not None:
        grad_up = grad_up.view(rows, columns)
        grad_x = grad_x + grad_up @ weights.up
        grad_up_weight = transposed_product(grad_up, x, weights.up)
        grad_up_bias = None if weights.up_bias is None else grad_up.sum(0)
    return grad_x, Weights(
        activated=transposed_product(grad_p, x, weights.activated),
        activated_bias=None if weights.activated_bias is None else grad_p.sum(0),
        up=grad_up_weight,
        up_bias=grad_up_bias,
        down=grad_down,
        down_bias=None if weights.down_bias is None else grad_z.sum(0),
    )
