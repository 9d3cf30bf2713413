"""Modules that are an MLP and no more, in any layer.

The norm that such a module reads hangs outside of it, so most of these rows name none.
"""

from __future__ import annotations

from collections.abc import Iterator

from steppe.blocks.patterns.conditions import is_no_more_than
from steppe.blocks.patterns.pattern import BlockPattern

# Gate, up, activation, down, dropout.
_MLP_MODULES: tuple[tuple[str | None, str, str, str, str | None], ...] = (
    ("gate_proj", "up_proj", "act_fn", "down_proj", None),
    ("gate_proj", "up_proj", "activation_fn", "down_proj", None),
    ("gate_proj", "up_proj", "act", "down_proj", None),
    ("gate_proj.linear", "up_proj.linear", "act_fn", "down_proj.linear", None),
    ("wi_0", "wi_1", "act", "wo", "dropout"),
    ("w_in.w_0", "w_in.w_1", "w_in.act", "w_out", None),
    (None, "up_proj", "act_fn", "down_proj", None),
    (None, "up_proj", "silu", "down_proj", None),
    (None, "fc1", "activation_fn", "fc2", None),
    (None, "fc1", "act_fn", "fc2", None),
    (None, "fc1", "activation", "fc2", None),
    (None, "fc1", "act", "fc2", None),
    (None, "linear1", "activation", "linear2", None),
    (None, "linear_fc1", "act_fn", "linear_fc2", None),
    (None, "lin1", "act", "lin2", None),
    (None, "in_proj", "gelu", "out_proj", None),
    (None, "proj_in", "activation", "proj_out", None),
    (None, "ffw_layer_1.linear", "act_fn", "ffw_layer_2.linear", None),
    (None, "intermediate_dense", "intermediate_act_fn", "output_dense", "intermediate_dropout"),
    (None, "dense1", "intermediate_act_fn", "dense2", None),
    (None, "intermediate", "activation_fn", "output", None),
    ("proj_up_gate", "proj_up", "act_fn", "proj_down", None),
)
# Gate and up in one layer, the gate first; activation, down, dropout.
_FUSED_MODULES: tuple[tuple[str, str, str, str | None], ...] = (
    ("gate_up_proj", "activation_fn", "down_proj", None),
    ("gate_up_proj", "act_fn", "down_proj", None),
    ("Wi", "act", "Wo", "drop"),
    ("input_linear", "activation", "output_linear", None),
)
# MLPs that call their activation as a function: gate, up, down.
_INLINE_MODULES: tuple[tuple[str | None, str, str], ...] = (
    (None, "c_fc", "c_proj"),
    (None, "fc1", "fc2"),
    (None, "fc_in", "fc_out"),
    (None, "lin1", "lin2"),
    (None, "linear1", "linear2"),
    (None, "up_proj", "down_proj"),
    (None, "wi", "wo"),
    ("w1", "w3", "w2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("c_gate", "c_fc", "c_proj"),
)
_INLINE_FUSED_MODULES = (
    ("weights_in", "weights_out"),
    ("w12", "w3"),
    ("gate_up_proj", "down_proj"),
    ("Wi", "Wo"),
)
# Layers in which the norm of such an MLP is known: family, path of the MLP, of the norm.
_INLINE_WITH_NORM = (
    ("modded nanoGPT, nanochat", "mlp", "ln_2"),
    ("Meta Llama", "feed_forward", "ffn_norm"),
)


def _of_modules() -> Iterator[BlockPattern]:
    """A row for each of `_MLP_MODULES` and `_FUSED_MODULES`."""
    for gate, up, act, down, dropout in _MLP_MODULES:
        paths = [path for path in (gate, up, act, down) if path is not None]
        yield BlockPattern(
            family=f"an MLP of {', '.join(paths)}",
            gate=gate,
            up=up,
            act=act,
            down=down,
            dropout=dropout,
            when=is_no_more_than(*paths),
        )
    for gate_up, act, down, dropout in _FUSED_MODULES:
        yield BlockPattern(
            family=f"an MLP of {gate_up}, {act}, {down}",
            gate_up=gate_up,
            act=act,
            down=down,
            dropout=dropout,
            when=is_no_more_than(gate_up, act, down),
        )


def _of_inline_modules() -> Iterator[BlockPattern]:
    """Rows for MLPs without an activation module, of a layer with a known norm or of any other."""
    for gate, up, down in _INLINE_MODULES:
        names = ", ".join(filter(None, (gate, up, down)))
        for family, mlp, norm in _INLINE_WITH_NORM:
            yield BlockPattern(
                family=f"{family} ({names}; inline)",
                norm=norm,
                gate=None if gate is None else f"{mlp}.{gate}",
                up=f"{mlp}.{up}",
                down=f"{mlp}.{down}",
            )
        yield BlockPattern(family=f"an MLP of {names} (inline)", gate=gate, up=up, down=down)
    for gate_up, down in _INLINE_FUSED_MODULES:
        for gate_first, place in ((True, "first"), (False, "last")):
            yield BlockPattern(
                family=f"an MLP of {gate_up}, {down} (gate {place}, inline)",
                gate_up=gate_up,
                gate_first=gate_first,
                down=down,
            )


MODULES = tuple(_of_modules())
"""MLPs with an activation in an attribute."""
INLINE_MODULES = tuple(_of_inline_modules())
"""MLPs whose forward calls a function as activation, which evaluation finds."""
