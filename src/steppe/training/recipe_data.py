"""The data and the model of a recipe, and the parts of the Trainer that follow from its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import PreTrainedModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from steppe.data.augmentation import Augmentation, BatchAugmenter, normalise
from steppe.data.embedded import BYTES, EMBEDDED, load_digits_split, load_pydoc_split
from steppe.data.image_data import load_image_data
from steppe.data.text_data import TextSettings, load_text_data, require_shards
from steppe.data.text_limits import vocabulary_of
from steppe.errors import CheckpointError, DataError, RecipeError
from steppe.training.quality import (
    Keep,
    image_quality,
    keep_correct,
    keep_correct_next,
    keep_ranks,
    token_quality,
)
from steppe.training.recipe import Recipe, default_of
from steppe.training.recipe_arguments import CAUSAL, IMAGES, SPANS, DataArguments
from steppe.training.recipe_model import build_model, config_of
from steppe.training.trainer import Prepare, SoftCrossEntropy

_PIXEL_MEAN = _PIXEL_STD = 0.5  # of each channel, as ViT was trained
_DIGITS_SHAPE, _DIGITS_CLASSES = (1, 8, 8), 10
_FOR_EMBEDDED = ("dataset", "data_dir", "held_out_samples", "length", "cache_dir", "vocab_size")


@dataclass(frozen=True)
class Job:
    """A recipe's data and model, and the parts of the Trainer that follow from its task.

    Attributes:
        model: without plug-ins.
        train: the training data.
        held_out: the held-out data.
        processor: tokenizer or image processor, saved beside the model; None for none.
        keep: makes of logits and labels the values that an evaluation gathers.
        quality: makes metrics of them.
        prepare: augments and normalises batches on the device; None where they are ready.
        takes_draws: whether the training data is asked by `Draw`, with a seed for each item.
        notes: assumptions about the data, for the user.
    """

    model: PreTrainedModel
    train: Any
    held_out: Any
    processor: Any
    keep: Keep
    quality: Callable[[Any], dict[str, float]]
    prepare: Prepare | None = None
    takes_draws: bool = True
    notes: tuple[str, ...] = ()


def load_job(recipe: Recipe) -> Job:
    """Load the data of a recipe, and build its model for it.

    Args:
        recipe: as `read_recipe` gives it.

    Raises:
        DataError: the data is not there, damaged, or does not fit.
        CheckpointError: the vanilla checkpoint is none, or has other classes.
        RecipeError: the model does not fit the data or the task.
    """
    if recipe.data.data_dir is None and recipe.data.dataset in EMBEDDED:
        return _embedded_job(recipe)
    return _image_job(recipe) if recipe.model.task == IMAGES else _text_job(recipe)


def place_of(asked: DataArguments) -> str:
    """The place of the data: a folder, which is there, or a name.

    Args:
        asked: of a recipe.

    Raises:
        DataError: the folder is not there.
    """
    if asked.data_dir is None:
        return str(asked.dataset)
    if not Path(asked.data_dir).expanduser().exists():
        raise DataError(
            f"{asked.data_dir}: there is no such file or folder. Put the data there, or name"
            " another"
            + (f" (without one {asked.dataset} is fetched from the hub)" if asked.dataset else ""),
            {"data_dir": "FOLDER"},
        )
    return asked.data_dir


def _image_job(recipe: Recipe) -> Job:
    """Images, and a model of them; its sizes are the config's, its classes are the data's."""
    asked = recipe.data
    config = config_of(recipe)
    if not isinstance(getattr(config, "image_size", None), int):
        raise RecipeError(
            f"model_type: {config.model_type} has no image_size, so it is no model of square"
            f" images, which the task {IMAGES} needs"
        )
    size, channels = config.image_size, int(getattr(config, "num_channels", 3))
    data = load_image_data(
        place_of(asked),
        size,
        channels,
        crop=asked.random_resized_crop,
        held_out_split=asked.held_out_split,
        held_out_samples=asked.held_out_samples,
    )
    augmenter = BatchAugmenter(_augmentation(asked), size, channels, len(data.classes))
    return Job(
        model=_image_model(recipe, data.classes),
        train=data.train,
        held_out=data.held_out,
        processor=ViTImageProcessorPil(
            size={"height": size, "width": size},
            image_mean=[_PIXEL_MEAN] * channels,
            image_std=[_PIXEL_STD] * channels,
        ),
        keep=keep_ranks,
        quality=image_quality,
        prepare=partial(_prepare_images, augmenter=augmenter, channels=channels),
        notes=data.notes,
    )


def _image_model(recipe: Recipe, classes: list[str]) -> PreTrainedModel:
    """The model of a recipe with the data's classes; its loss takes mixed labels."""
    names = dict(enumerate(classes))
    model = build_model(recipe, id2label=names, label2id={n: i for i, n in names.items()})
    if model.config.num_labels != len(names):
        raise CheckpointError(
            f"{recipe.model.checkpoint}: has {model.config.num_labels} classes, the data"
            f" {len(names)}. Name a checkpoint that was trained on this data."
        )
    model.loss_function = SoftCrossEntropy(recipe.data.label_smoothing)
    return model


def _augmentation(asked: DataArguments) -> Augmentation:
    """The augmentation of batches; a random resized crop mirrors images itself."""
    return Augmentation(
        rand_augment=asked.rand_augment,
        crop_padding=asked.crop_padding,
        flip=asked.flip and not asked.random_resized_crop,
        random_erasing=asked.random_erasing,
        mixup=asked.mixup,
        cutmix=asked.cutmix,
    )


def _prepare_images(
    batch: dict[str, Any], training: bool, augmenter: BatchAugmenter, channels: int
) -> dict[str, Any]:
    """A batch of images as the model takes it."""
    images, labels = batch["pixel_values"], batch["labels"]
    if training:
        images, labels = augmenter(images, labels)
    mean, std = [_PIXEL_MEAN] * channels, [_PIXEL_STD] * channels
    return {**batch, "pixel_values": normalise(images, mean, std), "labels": labels}


def _text_job(recipe: Recipe) -> Job:
    """Text, and a model of it."""
    asked = recipe.data
    settings = TextSettings(
        length=asked.length,
        corrupted=recipe.model.task == SPANS,
        streaming=asked.streaming,
        tokenizer=recipe.model.checkpoint if asked.tokenizer is None else asked.tokenizer,
        vocab_size=asked.vocab_size,
        cache=Path(asked.cache_dir),
        text_column=asked.text_column,
        held_out_split=asked.held_out_split,
        held_out_samples=asked.held_out_samples,
    )
    data = load_text_data(place_of(asked), settings)
    known: dict[str, Any] = {
        "vocab_size": len(data.tokenizer),
        "bos_token_id": data.tokenizer.bos_token_id,
        "eos_token_id": data.tokenizer.eos_token_id,
        "pad_token_id": data.tokenizer.pad_token_id,
    }
    if recipe.model.task == SPANS:
        known["decoder_start_token_id"] = data.tokenizer.pad_token_id
    model = build_model(recipe, **known)
    vocabulary = vocabulary_of(model)
    if vocabulary < len(data.tokenizer):
        raise RecipeError(
            f"the model's vocabulary has {vocabulary} tokens, the tokenizer's"
            f" {len(data.tokenizer)}. Name the model's own",
            {"tokenizer": "FOLDER_OR_HUB_ID"},
        )
    require_shards(data.train, recipe.training.world_size)
    return Job(
        model=model,
        train=data.train,
        held_out=data.held_out,
        processor=data.tokenizer,
        keep=keep_correct if recipe.model.task == SPANS else keep_correct_next,
        quality=token_quality,
        notes=data.notes,
    )


def _embedded_job(recipe: Recipe) -> Job:
    """One of the embedded sets, which are tensors as a model takes them, and a model of it.

    Nothing is random about their items, so the Trainer's own sampler orders them.
    """
    asked, name = recipe.data, str(recipe.data.dataset)
    task = IMAGES if name == "digits" else CAUSAL
    if recipe.model.task != task:
        raise RecipeError(f"{recipe.name}: {name} is for the task {task}, not {recipe.model.task}")
    for field in fields(asked):
        if field.name not in _FOR_EMBEDDED and getattr(asked, field.name) != default_of(field):
            raise RecipeError(
                f"{recipe.name}: {name} is fixed tensors, and has no use for {field.name}"
            )
    split = load_digits_split() if task == IMAGES else load_pydoc_split(asked.length)
    number = min(asked.held_out_samples or len(split.held_out), len(split.held_out))
    return Job(
        model=_digits_model(recipe) if task == IMAGES else bytes_model(recipe),
        train=split.train,
        held_out=Subset(split.held_out, range(number)),
        processor=None,
        keep=keep_ranks if task == IMAGES else keep_correct_next,
        quality=image_quality if task == IMAGES else token_quality,
        takes_draws=False,
    )


def _digits_model(recipe: Recipe) -> PreTrainedModel:
    """The model of a recipe for the embedded digits."""
    model = build_model(recipe, num_labels=_DIGITS_CLASSES)
    size, channels = (getattr(model.config, key, 0) for key in ("image_size", "num_channels"))
    if (channels, size, size) != _DIGITS_SHAPE or model.config.num_labels != _DIGITS_CLASSES:
        raise RecipeError(
            f"{recipe.name}: digits are {_DIGITS_CLASSES} classes of 1 × 8 × 8 pixels; the model"
            f" takes {model.config.num_labels} of {channels} × {size} × {size}"
        )
    return model


def bytes_model(recipe: Recipe) -> PreTrainedModel:
    """The model of a recipe for bytes of text.

    Args:
        recipe: as `read_recipe` gives it.

    Raises:
        RecipeError: the model knows fewer tokens than there are bytes.
    """
    model = build_model(recipe, vocab_size=BYTES, bos_token_id=0, eos_token_id=0)
    vocabulary = vocabulary_of(model)
    if vocabulary < BYTES:
        raise RecipeError(
            f"{recipe.name}: the tokens of pydoc are {BYTES} bytes; the model's vocabulary has"
            f" {vocabulary}"
        )
    return model
