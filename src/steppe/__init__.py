"""Measure why Transformer MLP activations are sparse, train them sparser, run them faster.

The public names are imported when one of them is first asked for, unless torch has been imported
already: ``steppe --help`` needs no torch, and whoever has it gets the custom ops with steppe.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from steppe.public import *  # noqa: F403

__version__ = "0.2.0"


def _teach_transformers(module: object) -> None:
    """Let the stock ``from_pretrained`` know models with plug-ins."""
    from steppe.checkpoints import stock

    stock.register()


def _teach_trainer(module: ModuleType) -> None:
    """Let the Trainer keep what a model card says of plug-ins."""
    from steppe.checkpoints import stock

    stock.wrap_trainer(module)


def _teach_peft(module: object) -> None:
    """Let PEFT save plug-ins beside its adapters."""
    from steppe.checkpoints import adapters

    adapters.register()


# As soon as they are imported, before or after steppe; importing them would take seconds.
register_post_import_hook(_teach_transformers, "transformers.modeling_utils")
register_post_import_hook(_teach_trainer, "transformers.trainer")
register_post_import_hook(_teach_peft, "peft")


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


if "torch" in sys.modules:
    __getattr__("__all__")
