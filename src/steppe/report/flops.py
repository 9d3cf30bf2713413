"""How much arithmetic the products of a block need, dense and at measured densities."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """One matrix product of a training step, for one token; a multiply-add is 2 FLOPs.

    Attributes:
        name: the layer of a forward product, the gradient that a backward product gives.
        backward: whether it belongs to the backward pass.
        dense: FLOPs of the whole product.
        sparse: FLOPs of those of its terms that are not zero.
    """

    name: str
    backward: bool
    dense: float
    sparse: float


@dataclass(frozen=True)
class BlockFlops:
    """The products of one block, or of several blocks, for one token.

    Attributes:
        products: in the order in which they run.
    """

    products: tuple[Product, ...]

    @property
    def dense_forward(self) -> float:
        """FLOPs of the forward products, dense."""
        return sum(product.dense for product in self.products if not product.backward)

    @property
    def forward(self) -> float:
        """FLOPs of the forward products at the given densities."""
        return sum(product.sparse for product in self.products if not product.backward)

    @property
    def dense_training(self) -> float:
        """FLOPs of a training step, dense."""
        return sum(product.dense for product in self.products)

    @property
    def training(self) -> float:
        """FLOPs of a training step at the given densities."""
        return sum(product.sparse for product in self.products)

    @property
    def inference_bound(self) -> float:
        """Dense over sparse forward FLOPs: 2 / (1 + ρ), gated 3 / (1 + 2 ρ)."""
        return self.dense_forward / self.forward

    @property
    def training_bound(self) -> float:
        """Dense over sparse FLOPs of a step: 6 / (1 + 5 ρ), gated 9 / (1 + 8 ρ), for ρ = ρ′."""
        return self.dense_training / self.training


def count_flops(
    d_model: int,
    d_hidden: int,
    density: float,
    derivative_density: float,
    gated: bool = False,
) -> BlockFlops:
    """FLOPs per token of the products of one block in a training step.

    Each product is 2 D F dense. Of a block of two matrices, `up` is dense, `down` and ∂W_down have
    the density ρ, ∂a, ∂x and ∂W_up the derivative density ρ′. Of a gated block, the gate is dense,
    `up`, `down`, ∂W_down, ∂x and ∂W of `up` have ρ, ∂x and ∂W of the gate ρ′, and ∂a the larger of
    both: where the activation is a rectifier, one set of units contains the other.

    Args:
        d_model: D, width of the input.
        d_hidden: F, width of the hidden layer.
        density: ρ, share of entries with a ≠ 0.
        derivative_density: ρ′, share of entries with σ′ ≠ 0.
        gated: whether the block has a gate.

    Returns:
        Six products, nine for a gated block; NaN follows from densities that are NaN.

    Source: arXiv 2605.25612, which products can skip what.

    Example:
        >>> flops = count_flops(2, 8, density=0.25, derivative_density=0.25)
        >>> flops.dense_training, flops.training, flops.inference_bound
        (192.0, 72.0, 1.6)
    """
    dense = 2.0 * d_model * d_hidden
    either = max(density, derivative_density)
    shares: tuple[tuple[str, bool, float], ...]
    if gated:
        shares = (
            ("gate", False, 1.0),
            ("up", False, density),
            ("down", False, density),
            ("∂a", True, either),
            ("∂W_down", True, density),
            ("∂x of up", True, density),
            ("∂W_up", True, density),
            ("∂x of gate", True, derivative_density),
            ("∂W_gate", True, derivative_density),
        )
    else:
        shares = (
            ("up", False, 1.0),
            ("down", False, density),
            ("∂a", True, derivative_density),
            ("∂W_down", True, density),
            ("∂x", True, derivative_density),
            ("∂W_up", True, derivative_density),
        )
    return BlockFlops(
        tuple(Product(name, backward, dense, dense * share) for name, backward, share in shares)
    )


def sum_flops(blocks: list[BlockFlops]) -> BlockFlops:
    """The products of several blocks, added by their names.

    Args:
        blocks: at least one; gated and ungated ones may be mixed.

    Returns:
        One product a name, in the order in which they first come.
    """
    names = dict.fromkeys(
        (product.name, product.backward) for block in blocks for product in block.products
    )
    sums = dict.fromkeys(names, (0.0, 0.0))
    for block in blocks:
        for product in block.products:
            key = (product.name, product.backward)
            dense, sparse = sums[key]
            sums[key] = (dense + product.dense, sparse + product.sparse)
    return BlockFlops(
        tuple(
            Product(name, backward, dense, sparse)
            for (name, backward), (dense, sparse) in sums.items()
        )
    )
