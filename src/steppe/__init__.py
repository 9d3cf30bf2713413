"""Measure why Transformer MLP activations are sparse, train them sparser, run them faster.

The public names are imported when one of them is first asked for: ``steppe --help`` needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steppe.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names, and give one of them, or a module that came with them."""
    import steppe.public as public

    names = public.__all__
    globals().update({each: getattr(public, each) for each in names}, __all__=names)
    try:
        return globals()[name]
    except KeyError:
        raise AttributeError(f"module 'steppe' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    """The names of the module, the public ones among them."""
    return sorted({*globals(), *__getattr__("__all__")})
