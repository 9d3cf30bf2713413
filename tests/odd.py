"""A Hugging Face model whose MLPs no built-in pattern finds, and patterns that find them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers import PreTrainedModel as Stock
from transformers.modeling_outputs import CausalLMOutput

from steppe import BlockPattern

VOCABULARY = 64
D_MODEL = 16
D_HIDDEN = 32


class OddConfig(PreTrainedConfig):
    """Of an `OddModel`."""

    model_type = "odd-of-steppe"

    def __init__(
        self,
        mlp_bias: bool = False,
        layers: int = 2,
        vocab_size: int = VOCABULARY,
        **rest: Any,
    ) -> None:
        self.mlp_bias = mlp_bias
        self.layers = layers
        self.vocab_size = vocab_size
        super().__init__(**rest)


class OddLayer(nn.Module):
    """Tokens are mixed by a running mean; the MLP's parts have names of their own."""

    def __init__(self, config: OddConfig, is_even: bool) -> None:
        super().__init__()
        self.is_even = is_even
        self.before = nn.LayerNorm(D_MODEL)
        self.widen = nn.Linear(D_MODEL, D_HIDDEN, bias=config.mlp_bias)
        self.bend = nn.ReLU()
        self.narrow = nn.Linear(D_HIDDEN, D_MODEL, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        counts = torch.arange(1, x.shape[1] + 1, device=x.device).to(x.dtype)
        x = x + x.cumsum(1) / counts[:, None]
        return x + self.narrow(self.bend(self.widen(self.before(x))))


class OddPreTrained(Stock):
    """What both models share."""

    config_class = OddConfig
    base_model_prefix = "body"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(std=0.3)


class OddModel(OddPreTrained):
    """The layers."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, D_MODEL)
        self.stack = nn.ModuleList(
            OddLayer(config, number % 2 == 0) for number in range(config.layers)
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``[B, T]`` to ``[B, T, D]``."""
        x = self.embed_tokens(input_ids)
        for layer in self.stack:
            x = layer(x)
        return x


class OddForCausalLM(OddPreTrained):
    """The layers with a head."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.body = OddModel(config)
        self.head = nn.Linear(D_MODEL, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **rest: Any,
    ) -> CausalLMOutput:
        """Logits ``[B, T, V]``, and the loss."""
        logits = self.head(self.body(input_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **rest)
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register(OddConfig.model_type, OddConfig, exist_ok=True)
AutoModel.register(OddConfig, OddModel, exist_ok=True)
AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)

PATTERN = BlockPattern(family="odd", norm="before", up="widen", act="bend", down="narrow")
TEXT = (
    "BlockPattern(family='odd', norm='before', up='widen', act='bend', down='narrow')"  # as typed
)


def odd(mlp_bias: bool = False, layers: int = 2) -> OddForCausalLM:
    """A model that no built-in pattern knows, the same one each time."""
    torch.manual_seed(0)
    return OddForCausalLM(OddConfig(mlp_bias, layers, architectures=["OddForCausalLM"]))


def ids(rows: int = 2, length: int = 8, seed: int = 0) -> Tensor:
    """Tokens ``[rows, length]``."""
    return torch.randint(
        3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)
    )
