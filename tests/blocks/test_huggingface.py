"""Facts about Hugging Face models: the longest sequence, the decoder, the inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import models
from models import MAX_TOKENS
from steppe.blocks.huggingface import decoders, forward_parameters, max_tokens_of


class OneArgument(nn.Module):
    """A module of somebody else's."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("build", "tokens"),
    [
        (models.opt, MAX_TOKENS),
        (models.gpt2, MAX_TOKENS),
        (models.bert, MAX_TOKENS),
        (models.llama, MAX_TOKENS),
        (lambda: torch.compile(models.opt(), backend="eager"), MAX_TOKENS),
        (models.vit, 5),
        (models.t5, None),
        (models.torch_encoder, None),
    ],
    ids=["opt", "gpt2", "bert", "llama", "compiled", "vit", "t5", "torch"],
)
def test_the_longest_sequence_is_what_the_config_says(
    build: Callable[[], nn.Module], tokens: int | None
) -> None:
    assert max_tokens_of(build()) == tokens


def test_patches_need_not_be_square() -> None:
    model = models.vit()
    model.config.image_size, model.config.patch_size = (8, 16), (4, 2)
    assert max_tokens_of(model) == 2 * 8 + 1


def test_only_an_encoder_decoder_has_a_decoder() -> None:
    model = models.t5()
    for one in (model, torch.compile(model, backend="eager"), nn.Sequential(model)):
        assert list(decoders(one)) == [(model, set(model.get_submodule("decoder").modules()))]
    assert list(decoders(models.opt())) == []
    assert list(decoders(models.torch_encoder())) == []


def test_parameters_of_forward_come_in_order() -> None:
    assert forward_parameters(OneArgument()) == ["x"]
    told = ["src", "mask", "src_key_padding_mask", "is_causal"]
    assert forward_parameters(models.torch_encoder()) == told
