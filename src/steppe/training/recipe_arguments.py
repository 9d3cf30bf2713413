"""The keys of a recipe that are steppe's own: the model, the data and the arm."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from steppe.blocks.pattern_values import pattern_from_text
from steppe.blocks.patterns import BlockPattern
from steppe.errors import PatternError, RecipeError
from steppe.training.recipe_file import shown

ARMS = ("vanilla", "control", "steppe", "threshold", "best")
NORMS_NOT_DECAYED = ("control", "threshold", "best")
"""The arms in which the norms before the MLPs have no weight decay."""
IMAGES, CAUSAL, SPANS = "image-classification", "causal-lm", "span-corruption"
TASKS = (IMAGES, CAUSAL, SPANS)


@dataclass
class ModelArguments:
    """The model that is trained."""

    task: str = field(metadata={"help": f"One of {', '.join(TASKS)}."})
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture of Transformers: vit, gpt2, t5, …"}
    )
    model_config: str = field(
        default="{}", metadata={"help": "Settings of its config; a mapping, as a flag in JSON."}
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "Vanilla model to finetune; a folder or a hub id."}
    )
    patterns: list[str] = field(
        default_factory=list,
        metadata={"help": "Of MLPs that steppe does not know: mappings, or BlockPattern(...)."},
    )
    xavier: bool = field(
        default=False,
        metadata={"help": "Draw the weights of linear layers by Xavier's uniform rule."},
    )
    lora_rank: int = field(default=0, metadata={"help": "LoRA on the attention; 0 for none."})
    lora_targets: list[str] = field(
        default_factory=list, metadata={"help": "Names of the attention's linear layers."}
    )


@dataclass
class DataArguments:
    """The data that it is trained on."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, id:config, digits or pydoc; used where data_dir is not given."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder: IDX files, one of images a class, text, JSON lines, parquet."},
    )
    held_out_split: str | None = field(
        default=None, metadata={"help": "By default the validation or test split."}
    )
    held_out_samples: int = field(
        default=0, metadata={"help": "Evaluate on the first so many samples; 0 for all."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data while training, not before."}
    )
    length: int = field(default=512, metadata={"help": "Tokens per sample."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub id; by default that of the checkpoint, or one is trained and"
            " cached."
        },
    )
    vocab_size: int = field(default=8192, metadata={"help": "Of the tokenizer that is trained."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text."})
    cache_dir: str = field(
        default="~/.cache/steppe", metadata={"help": "Where trained tokenizers are kept."}
    )
    random_resized_crop: bool = field(default=False, metadata={"help": "As for ImageNet."})
    repeated_augmentation: int = field(
        default=1, metadata={"help": "Times that an image is drawn in a row (Hoffer et al., 2020)."}
    )
    rand_augment: int = field(
        default=0, metadata={"help": "Magnitude of RandAugment's two operations, 0 … 30."}
    )
    crop_padding: int = field(default=0, metadata={"help": "Random crop of the padded image."})
    flip: bool = field(default=False, metadata={"help": "Random horizontal flip."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability."})
    mixup: float = field(default=0.0, metadata={"help": "α of the Beta distribution; 0 for none."})
    cutmix: float = field(default=0.0, metadata={"help": "α of the Beta distribution; 0 for none."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share, of classifiers."})


@dataclass
class ArmArguments:
    """The arm: the part that steppe has in the training."""

    arm: str = field(
        default="best",
        metadata={
            "help": "vanilla, control (the MLP norms' scales not decayed), steppe (the paper's"
            " three plug-ins), threshold (control with the rising threshold), or best (all four)."
        },
    )
    zeroth_bias: bool | None = field(default=None, metadata={"help": "By default as the arm."})
    restricted_norm: bool | None = field(default=None, metadata={"help": "By default as the arm."})
    jumping_squared_relu: bool | None = field(
        default=None, metadata={"help": "By default as the arm."}
    )
    rising_threshold: bool | None = field(default=None, metadata={"help": "By default as the arm."})
    threshold_multiple: float = field(
        default=2.0, metadata={"help": "The threshold at the end, in standard deviations."}
    )
    threshold_ramp: float = field(
        default=0.5, metadata={"help": "Share of the run over which the threshold rises."}
    )
    activation_penalty: float = field(
        default=0.0, metadata={"help": "Strength of an L1 penalty on the activations; 0 for none."}
    )
    penalty_ramp: float = field(
        default=0.0, metadata={"help": "Share of the run over which the penalty rises."}
    )
    plugins: str = field(
        default="{}",
        metadata={
            "help": "Plug-ins with settings, by key; one with the key of an arm's plug-in replaces"
            " it. A mapping, as a flag in JSON."
        },
    )
    ramp: float = field(
        default=0.0,
        metadata={"help": "Share of the run over which floor and activation change; finetuning."},
    )
    accelerate: bool = field(
        default=False,
        metadata={"help": "Train on the sparse kernels: the same numbers, sooner; CPU."},
    )
    measure_every: int = field(default=50, metadata={"help": "Measure one step in so many."})
    held_out_flatness: bool = field(
        default=False, metadata={"help": "Measure AF on the held-out data too, at the end."}
    )
    time_blocks: float = field(
        default=0.0,
        metadata={"help": "Seconds to time the trained blocks on sparse kernels; 0 for none."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last whole checkpoint, if there is one."}
    )


def model_settings(model: ModelArguments) -> dict[str, Any]:
    """The settings of the model's config.

    Args:
        model: of a recipe.

    Raises:
        RecipeError: they are no mapping.
    """
    try:
        settings = json.loads(model.model_config)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"model_config: not valid JSON ({shown(error)}), e.g. '{{\"hidden_size\": 64}}'"
        ) from None
    if not isinstance(settings, dict):
        raise RecipeError(f"model_config: expected a mapping, got {shown(model.model_config)}")
    return settings


def patterns_of(model: ModelArguments) -> list[BlockPattern]:
    """The patterns of the model's MLPs; none where the built-in ones match.

    Args:
        model: of a recipe.

    Raises:
        RecipeError: a text is no pattern.
    """
    try:
        return [pattern_from_text(text) for text in model.patterns]
    except PatternError as error:
        raise RecipeError(f"patterns: {error}") from None
