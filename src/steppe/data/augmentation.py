"""Augment batches of images on their device, by Kornia."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kornia.augmentation import (
    ImageSequential,
    RandomCrop,
    RandomCutMixV2,
    RandomErasing,
    RandomHorizontalFlip,
    RandomMixUpV2,
)
from kornia.augmentation.auto import RandAugment
from torch import Tensor, nn
from torch.nn import functional as F

from steppe.errors import DataError


@dataclass(frozen=True)
class Augmentation:
    """Random changes of images in training.

    Attributes:
        rand_augment: magnitude of RandAugment's two operations, 0 … 30; 0 for none.
        crop_padding: pixels by which images are padded before a random crop.
        flip: mirror half of them.
        random_erasing: probability that a part is erased.
        mixup: α of its Beta distribution; 0 for none.
        cutmix: the same.

    Raises:
        DataError: a value is out of range.
    """

    rand_augment: int = 0
    crop_padding: int = 0
    flip: bool = False
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if (
            not 0 <= self.rand_augment <= 30
            or not 0.0 <= self.random_erasing <= 1.0
            or min(self.crop_padding, self.mixup, self.cutmix) < 0
        ):
            raise DataError(
                "expected rand_augment in 0 … 30, random_erasing in 0 … 1, and crop_padding, mixup"
                f" and cutmix ≥ 0, got {self}"
            )


class BatchAugmenter:
    """Augments batches; all random numbers come from torch's global generator.

    Args:
        augmentation: the changes.
        size: height and width of the images.
        channels: 1 or 3.
        classes: number of classes.

    Raises:
        DataError: RandAugment of grey images: it would change their colours.
    """

    def __init__(self, augmentation: Augmentation, size: int, channels: int, classes: int) -> None:
        if augmentation.rand_augment and channels != 3:
            raise DataError(
                f"RandAugment needs images of 3 channels, got {channels}", {"rand_augment": 0}
            )
        padding = augmentation.crop_padding
        steps: list[nn.Module] = []
        if padding:
            steps.append(RandomCrop((size, size), padding=padding))
        if augmentation.flip:
            steps.append(RandomHorizontalFlip())
        if augmentation.rand_augment:
            steps.append(RandAugment(n=2, m=augmentation.rand_augment))
        if augmentation.random_erasing:
            steps.append(RandomErasing(p=augmentation.random_erasing))
        self._steps = ImageSequential(*steps) if steps else None
        self._augmentation = augmentation
        self._classes = classes

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch, augmented.

        Args:
            images: uint8 ``[B, C, H, W]``.
            labels: int64 ``[B]``.

        Returns:
            Images, float32 in 0 … 1, and labels: float32 ``[B, classes]`` where images are mixed.
        """
        images = images.float() / 255
        if self._steps is not None:
            images = self._steps(images)
        mixing = self._draw_mixing()
        if mixing is None:
            return images, labels
        images, mixed = mixing(images, labels)
        own, other, share = mixed.reshape(-1, 3).unbind(-1)
        if isinstance(mixing, RandomCutMixV2):
            share = 1.0 - share  # CutMix gives the share of the image's own pixels
        first = F.one_hot(own.long(), self._classes)
        second = F.one_hot(other.long(), self._classes)
        return images, torch.lerp(first.float(), second.float(), share[:, None].float())

    def _draw_mixing(self) -> nn.Module | None:
        """Mixup or cutmix for a batch, each half of the time where both are on."""
        mixup, cutmix = self._augmentation.mixup, self._augmentation.cutmix
        if mixup and (not cutmix or bool(torch.rand(()) < 0.5)):
            # Kornia draws the share from a uniform distribution, Zhang et al. (2018) from a Beta.
            share = float(torch.distributions.Beta(mixup, mixup).sample())
            return RandomMixUpV2((share, share), same_on_batch=True, data_keys=["input", "class"])
        if cutmix:
            return RandomCutMixV2(
                beta=cutmix, data_keys=["input", "class"], use_correct_lambda=True
            )
        return None


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images as the model takes them.

    Args:
        images: uint8 in 0 … 255, or float in 0 … 1, ``[B, C, H, W]``.
        mean: of each channel, in 0 … 1.
        std: the same.

    Returns:
        float32, the same shape.
    """
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images
    shape = (1, -1, 1, 1)
    means, stds = (scaled.new_tensor(values).reshape(shape) for values in (mean, std))
    return (scaled - means) / stds
