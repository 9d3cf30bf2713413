"""Saved models with plug-ins: written by ``save_pretrained``, loaded by anybody."""

from wrapt import register_post_import_hook

from steppe.checkpoints.load import load_pretrained, load_weights_

__all__ = ["load_pretrained", "load_weights_"]


def _teach_transformers(module: object) -> None:
    from steppe.checkpoints import stock

    stock.register()


def _teach_peft(module: object) -> None:
    from steppe.checkpoints import adapters

    adapters.register()


# As soon as they are imported, before or after this; importing them would take seconds.
register_post_import_hook(_teach_transformers, "transformers.modeling_utils")
register_post_import_hook(_teach_peft, "peft")
