"""A small GPT in plain torch, and how steppe finds its blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steppe import BlockPattern

PATTERNS = (BlockPattern(family="GPT of gpu_steps", norm="norm2", up="up", act="act", down="down"),)


@dataclass(frozen=True)
class Sizes:
    """Of a model: D, F, layers, heads, longest sequence, vocabulary."""

    d_model: int = 512
    d_hidden: int = 2048
    layers: int = 12
    heads: int = 8
    tokens: int = 1024
    vocabulary: int = 256


class Layer(nn.Module):
    """Causal attention and an MLP block with ReLU, each behind its norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm1 = nn.LayerNorm(sizes.d_model)
        self.qkv = nn.Linear(sizes.d_model, 3 * sizes.d_model, bias=False)
        self.out = nn.Linear(sizes.d_model, sizes.d_model, bias=False)
        self.norm2 = nn.LayerNorm(sizes.d_model)
        self.up = nn.Linear(sizes.d_model, sizes.d_hidden)
        self.act = nn.ReLU()
        self.down = nn.Linear(sizes.d_hidden, sizes.d_model)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` to the same; padding is bool ``[B, 1, T, T]``, True where to look."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D / H]
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, padding, is_causal=padding is None)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Logits of the next byte.

    Args:
        sizes: of the model.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.d_model)
        self.position = nn.Embedding(sizes.tokens, sizes.d_model)
        self.layers = nn.ModuleList([Layer(sizes) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(sizes.d_model)
        self.head = nn.Linear(sizes.d_model, sizes.vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_last = name.endswith(("out.weight", "down.weight"))  # of a residual branch
                depth = math.sqrt(2 * sizes.layers) if is_last else 1.0
                nn.init.normal_(weight, std=0.02 / depth)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``[B, T]`` to ``[B, T, vocabulary]``; the mask ``[B, T]`` is 0 for padding."""
        tokens = input_ids.shape[1]
        positions = torch.arange(tokens, device=input_ids.device)
        padding = None
        if attention_mask is not None:
            causal = positions[:, None] >= positions
            # A token sees itself, so that padding on the left has something to look at.
            seen = attention_mask[:, None, None, :].bool() | torch.eye(
                tokens, dtype=torch.bool, device=input_ids.device
            )
            padding = causal & seen
        x = self.embedding(input_ids) + self.position(positions)
        for layer in self.layers:
            x = layer(x, padding)
        return self.head(self.norm(x))


def loss_of(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Mean cross-entropy of each next byte, in nats; ``[B, T, V]`` and ``[B, T]``."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
