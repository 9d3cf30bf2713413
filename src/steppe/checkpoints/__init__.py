"""Saved models with plug-ins: written by ``save_pretrained``, loaded by anybody."""

from wrapt import register_post_import_hook

from steppe.checkpoints.load import load_pretrained, load_weights_

__all__ = ["load_pretrained", "load_weights_"]


def _teach(module: object) -> None:
    from steppe.checkpoints import stock

    stock.register()


# As soon as Transformers is imported, before or after this; importing it would take a second.
register_post_import_hook(_teach, "transformers.modeling_utils")
