from __future__ import annotations

import pytest
import torch

from steppe.data.augmentation import Augmentation, BatchAugmenter, normalise
from steppe.errors import DataError

CLASSES = 8


def batch(channels: int = 3, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are full of thirty times their class."""
    labels = torch.arange(CLASSES)
    images = (labels * 30).to(torch.uint8)[:, None, None, None]
    return images.expand(-1, channels, size, size).contiguous(), labels


@pytest.mark.parametrize("how", [Augmentation(mixup=0.2), Augmentation(cutmix=1.0)])
@pytest.mark.parametrize("seed", range(5))
def test_labels_are_mixed_as_the_images_are(how: Augmentation, seed: int) -> None:
    images, labels = batch()
    torch.manual_seed(seed)
    mixed, soft = BatchAugmenter(how, 16, 3, CLASSES)(images, labels)
    assert soft.shape == (CLASSES, CLASSES)
    torch.testing.assert_close(soft.sum(1), torch.ones(CLASSES))
    # The mean of an image tells how much of which class is in it.
    expected = soft @ (torch.arange(CLASSES) * 30 / 255)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, atol=1e-5, rtol=0)


def test_cutmix_pastes_and_mixup_blends() -> None:
    images, labels = batch()
    torch.manual_seed(1)
    pasted, _ = BatchAugmenter(Augmentation(cutmix=1.0), 16, 3, CLASSES)(images, labels)
    values = {round(float(value) * 255) for value in pasted.unique()}
    assert values <= {30 * label for label in range(CLASSES)}
    blended, soft = BatchAugmenter(Augmentation(mixup=1.0), 16, 3, CLASSES)(images, labels)
    assert all(len(image.unique()) == 1 for image in blended)
    assert (soft > 0).sum() > CLASSES


def test_both_take_turns() -> None:
    images, labels = batch()
    augmenter = BatchAugmenter(Augmentation(mixup=1.0, cutmix=1.0), 16, 3, CLASSES)
    torch.manual_seed(0)
    kinds = {len(augmenter(images, labels)[0][0].unique()) > 1 for _ in range(30)}
    assert kinds == {True, False}


def test_the_same_generator_gives_the_same_batch() -> None:
    images, labels = batch()
    how = Augmentation(9, crop_padding=2, flip=True, random_erasing=0.3, mixup=0.2, cutmix=1.0)
    augmenter = BatchAugmenter(how, 16, 3, CLASSES)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(augmenter(images, labels))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])
    assert found[0][0].min() >= 0
    assert found[0][0].max() <= 1


def test_without_augmentation_nothing_changes() -> None:
    images, labels = batch(channels=1)
    same, own = BatchAugmenter(Augmentation(), 16, 1, CLASSES)(images, labels)
    assert torch.equal(same * 255, images.float())
    assert torch.equal(own, labels)


def test_pixels_are_normalised_per_channel() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1)
    got = normalise(images, [0.5, 0.25], [0.5, 0.25]).flatten().tolist()
    assert got == [-1.0, 3.0]


def test_rand_augment_of_grey_images_is_refused() -> None:
    with pytest.raises(DataError, match="rand_augment=0"):
        BatchAugmenter(Augmentation(rand_augment=9), 28, 1, 10)


def test_values_out_of_range_are_refused() -> None:
    for wrong in ({"mixup": -0.1}, {"rand_augment": 31}, {"random_erasing": 1.5}):
        with pytest.raises(DataError, match="expected"):
            Augmentation(**wrong)
