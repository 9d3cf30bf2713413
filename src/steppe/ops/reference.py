"""Every sparse op in plain torch: the definition, which also runs where there is no kernel.

A matrix ``[T, F]`` that is mostly zero is stored as column-tiled CSR: its entries, `values`
``[nnz]``, and its support, `index` and `offsets`. The columns are cut into equal tiles, a multiple
of `TILE_UNIT` wide; the entries are sorted by tile, then row, then column. `index`, int16
``[nnz]``, is the column within its tile. `offsets`, int64 ``[tiles · T + 1]``, has the row pointers
of each tile: the entries of row t in tile j are those from ``offsets[j · T + t]`` up to
``offsets[j · T + t + 1]``. The width of the tiles follows from their number. Kernels choose the
tiles; every op takes any.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE_UNIT = 64
MAX_TILE = 32704  # columns; the largest multiple of the unit below 2¹⁵, for int16


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
    """The CSR of ``max(p, 0)``; NaN is an entry, as ReLU keeps it.

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
    """The row and the column of each entry of a support.

    Args:
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        rows: T.
        columns: F.

    Returns:
        Rows and columns, int64 ``[nnz]`` each.
    """
    places = torch.arange(offsets.shape[0] - 1, device=index.device)  # j · T + t
    place = torch.repeat_interleave(places, offsets.diff(), output_size=index.shape[0])
    tile = tile_of(offsets, rows, columns)
    return place % max(rows, 1), place // max(rows, 1) * tile + index


def densify(values: Tensor, index: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    """The dense matrix of a CSR.

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
    """Sparse × dense: ``A M`` with A as CSR.

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
    """Transposed sparse × dense, the gradient of a weight: ``Aᵀ G`` with A as CSR.

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
    """Sampled dense × dense (SDDMM): the entries of ``G Mᵀ`` on a support.

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
        down: ``[F, D]``; row i times aᵢ is the share of unit i in the output.
        down_bias: ``[D]``.
    """

    activated: Tensor
    activated_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Rule(NamedTuple):
    """The function between the two products: σ(p) = α r + β r² and dropout.

    Attributes:
        alpha: α ≥ 0.
        beta: β ≥ 0; a 0-dim tensor where reading the number would wait for a device.
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
        """Draw the entries that dropout keeps, bool; empty without dropout."""
        count = like.numel() if self.dropout else 0
        kept = torch.empty(count, dtype=torch.bool, device=like.device)
        return kept.bernoulli_(1.0 - self.dropout)

    def drop(self, values: Tensor, kept: Tensor) -> Tensor:
        """Values after dropout, or gradients before it."""
        if not self.dropout:
            return values
        return values * kept / (1.0 - self.dropout) if self.dropout < 1 else values * 0.0

    def before_dropout(self, r: Tensor, up: Tensor) -> Tensor:
        """The hidden entries before dropout: σ(r), times `up` in a gated block."""
        a = self.activation(r)
        return a * up if up.numel() else a

    def hidden(self, r: Tensor, up: Tensor, kept: Tensor) -> Tensor:
        """The input of `down`: σ(r), times `up` in a gated block, after dropout."""
        return self.drop(self.before_dropout(r, up), kept)

    def split(
        self, grad_hidden: Tensor, r: Tensor, up: Tensor, kept: Tensor, grad_l1: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of p and, in a gated block, of `up`, from that of the input of `down`.

        They hold where r ≠ 0; elsewhere both are 0.

        Args:
            grad_hidden: of the input of `down`.
            r: of the same entries; so the next two.
            up: of a gated block, else empty.
            kept: by dropout, or empty.
            grad_l1: of the entry's token in `l1`, or None.
        """
        grad_a = self.drop(grad_hidden, kept)
        if grad_l1 is not None and up.numel():
            grad_a = grad_a + grad_l1 * self.before_dropout(r, up).sgn()
        elif grad_l1 is not None:  # no entry is negative
            grad_a = grad_a + grad_l1
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
    """``leftᵀ right`` in the memory layout of another matrix, row-major or column-major.

    Args:
        left: ``[T, F]``.
        right: ``[T, D]``.
        like: ``[F, D]``, the matrix with that layout.

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
        z ``[T, D]``; r = max(p, 0), ``[T · F]``; the factor of σ(r) in a gated block, ``[T · F]``,
        else empty; the entries that dropout keeps, bool ``[T · F]``, or empty.
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


def l1(r: Tensor, up: Tensor, rule: Rule, rows: int) -> Tensor:
    """Σ|a| of each token, before dropout, ``[T]``, float32 or wider.

    Args:
        r: ``[T · F]``, from `mlp`.
        up: the factor of σ(r) in a gated block, else empty.
        rule: the activation.
        rows: T.
    """
    wide = torch.promote_types(r.dtype, torch.float32)
    return rule.before_dropout(r, up).abs().view(rows, -1).sum(1, dtype=wide)


def mlp_backward(
    grad_z: Tensor,
    grad_l1: Tensor | None,
    x: Tensor,
    weights: Weights,
    rule: Rule,
    r: Tensor,
    up: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Weights]:
    """The gradients of `mlp` and `l1`, dense.

    Args:
        grad_z: ``[T, D]``.
        grad_l1: ``[T]``, or None.
        x: ``[T, D]``.
        weights: of the block.
        rule: activation and dropout.
        r: ``[T · F]``, from `mlp`; so the next two.
        up: the factor of σ(r) in a gated block, else empty.
        kept: the entries that dropout keeps, or empty.

    Returns:
        The gradients of x and of the weights; None where there is no weight.
    """
    rows, columns = x.shape[0], weights.down.shape[0]
    hidden = rule.hidden(r, up, kept).view(rows, columns)
    grad_down = transposed_product(hidden, grad_z, weights.down)
    by_entry = None
    if grad_l1 is not None:
        by_entry = grad_l1.to(x.dtype).unsqueeze(1).expand(rows, columns).flatten()
    grad_hidden = (grad_z @ weights.down.T).flatten()
    grad_p, grad_up = rule.split(grad_hidden, r, up, kept, by_entry)
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
