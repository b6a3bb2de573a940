from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.tasks import ImageTransform, seeded

PICTURES = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=seeded(7))
NORM = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def _origin(out: Tensor, picture: Tensor, padding: int) -> tuple[int, int, bool]:
    """Find by search where ``out`` was cut from ``picture``."""
    padded = F.pad(picture, (padding,) * 4)
    for down in range(2 * padding + 1):
        for right in range(2 * padding + 1):
            window = padded[:, down : down + 8, right : right + 8]
            for flipped in (False, True):
                if torch.equal(out, window.flip(-1) if flipped else window):
                    return down, right, flipped
    msg = "not a window of the padded picture"
    raise AssertionError(msg)


def test_augment_gives_windows_of_the_same_picture_everywhere_in_the_border_both_ways() -> None:
    out = ImageTransform(**NORM, padding=2, flip=True).augment(PICTURES, seeded(0))
    assert out.shape == PICTURES.shape
    assert out.dtype == torch.uint8
    origins = [_origin(o, p, 2) for o, p in zip(out, PICTURES, strict=True)]
    assert {d for d, _, _ in origins} == {r for _, r, _ in origins} == set(range(5))
    assert 16 < sum(flipped for _, _, flipped in origins) < 48


def test_augment_depends_on_the_generator_alone() -> None:
    transform = ImageTransform(**NORM, padding=2, flip=True)
    first, again, other = (transform.augment(PICTURES, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_crop_or_flip_alone() -> None:
    cropped = ImageTransform(**NORM, padding=2).augment(PICTURES, seeded(0))
    assert not any(_origin(o, p, 2)[2] for o, p in zip(cropped, PICTURES, strict=True))
    flipped = ImageTransform(**NORM, flip=True).augment(PICTURES, seeded(0))
    assert {_origin(o, p, 0)[2] for o, p in zip(flipped, PICTURES, strict=True)} == {False, True}
    assert torch.equal(ImageTransform(**NORM).augment(PICTURES, seeded(0)), PICTURES)


def test_prepare_normalises_each_channel_and_leaves_the_stored_bytes() -> None:
    before = PICTURES.clone()
    out = ImageTransform(**NORM).prepare(PICTURES)
    for channel, (mean, std) in enumerate(zip(NORM["mean"], NORM["std"], strict=True)):
        torch.testing.assert_close(out[:, channel], (before[:, channel].float() / 255 - mean) / std)
    assert torch.equal(PICTURES, before)


def test_channels_last_changes_strides_only() -> None:
    plain, last = ImageTransform(**NORM).prepare(PICTURES), ImageTransform(**NORM, channels_last=True).prepare(PICTURES)
    assert torch.equal(plain, last)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
