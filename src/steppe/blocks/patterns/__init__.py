"""Where the parts of MLP blocks hang: the only package that knows foreign architectures.

One declarative table, `PATTERNS`, has a row for each family: where the parts of a block hang below
the module that owns them. A new architecture is a new row in the file of its family; a user's own
row goes in through ``find_blocks(model, patterns=[...])``. The first row that matches an owner
wins. Where two rows can match one owner, `ORDER` names them and says why; no other place matters.
"""

from steppe.blocks.patterns.conditions import OTHER_MLP_NORMS
from steppe.blocks.patterns.decoders import DECODERS
from steppe.blocks.patterns.encoder_decoders import ENCODER_DECODERS
from steppe.blocks.patterns.encoders import ENCODERS
from steppe.blocks.patterns.experts import EXPERTS
from steppe.blocks.patterns.layers import LAYERS
from steppe.blocks.patterns.modules import INLINE_MODULES, MODULES
from steppe.blocks.patterns.order import Before, families_of, in_order
from steppe.blocks.patterns.pattern import BlockPattern
from steppe.blocks.patterns.speech import SPEECH
from steppe.blocks.patterns.vision import VISION

__all__ = ["ORDER", "OTHER_MLP_NORMS", "PATTERNS", "BlockPattern"]

_WITH_ACTIVATION = (
    *(*DECODERS, *ENCODER_DECODERS, *ENCODERS, *VISION, *SPEECH, *EXPERTS, *LAYERS),
    *MODULES,
)

ORDER: tuple[Before, ...] = (
    Before(
        first=("RoBERTa-PreLayerNorm",),
        then=("MPNet",),
        why="it has the norm of MPNet's row too, and attention reads that one",
    ),
    Before(
        first=(
            *("ViT (Transformers 4)", "BERT (cross-attention)", "BERT (post-norm)", "FNet"),
            *("Megatron-BERT", "RoBERTa-PreLayerNorm", "MPNet", "Swin v2, MobileBERT"),
        ),
        then=("BERT's like",),
        why="the same layers, and the later row names no norm",
    ),
    Before(
        first=(
            *("OPT", "OPT (post-norm)", "BART, Marian (encoder)", "BART, Marian (decoder)"),
            "M2M100, mBART, Pegasus, Whisper",
        ),
        then=("FSMT, Deformable DETR",),
        why="the same layers, and the later row names no norm",
    ),
    Before(
        first=("Moonshine, Canary (decoder)",),
        then=("Mimi, Moonshine, Llama 4 (vision)",),
        why="cross-attention reads post_attention_layernorm in a decoder, the MLP final_layernorm",
    ),
    Before(
        first=("BERT (post-norm)",),
        then=("LiLT (layout)",),
        why="a layer with two MLPs: the text's is the one that is found",
    ),
    Before(
        first=("LXMERT (language)",),
        then=("LXMERT (vision)",),
        why="a layer with two MLPs: the text's is the one that is found",
    ),
    Before(
        first=("Swin v2, MobileBERT", "BERT's like"),
        then=("BLIP-2 (Q-Former)",),
        why="a layer with two MLPs: the text's is the one that is found",
    ),
    Before(
        first=families_of(row for row in EXPERTS if row.is_expert),
        then=families_of(MODULES),
        why="an expert is an MLP of the same parts, and only its own row says where its tokens are",
    ),
    Before(
        first=families_of(_WITH_ACTIVATION),
        then=families_of(INLINE_MODULES),
        why="evaluation finds an activation that is a module too, as a second one beside it",
    ),
)
"""Which rows are tried before which others, and why."""

PATTERNS: tuple[BlockPattern, ...] = in_order((*_WITH_ACTIVATION, *INLINE_MODULES), ORDER)
"""The MLP blocks of a model: where their parts are in each architecture."""
