"""Sums over all patches from shifted products, against the patches themselves."""

from __future__ import annotations

import pytest
import torch

from tenfold.calibration.correlation import PatchGram, covers, patch_cross, patch_sum
from tenfold.calibration.im2col import input_patches, output_rows
from tenfold.calibration.moment_sums import MomentSums
from tenfold.records import LayerSpec


def conv(channels: int, out: int, **more: object) -> LayerSpec:
    return LayerSpec(kind="conv", in_channels=channels, out_channels=out, kernel=(3, 3), **{"padding": (1, 1)} | more)


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (3, 3), (8, 6)])
@pytest.mark.parametrize("channels", [1, 4])
def test_sums_over_patches_are_those_of_the_patches(size, channels):
    x, y = torch.randn(3, channels, *size).double(), torch.randn(3, 5, *size).double()
    spec = conv(channels, 5)
    patches, rows = input_patches(x, spec), output_rows(y, spec)
    gram = PatchGram()
    for part in x.split(2):
        gram.add(part)
    torch.testing.assert_close(gram.value(), patches @ patches.mT)
    torch.testing.assert_close(patch_sum(x), patches.sum(-1))
    torch.testing.assert_close(patch_cross(y, x), rows @ patches.mT)


@pytest.mark.parametrize("padding", [(1, 1), "same"])
def test_moments_of_whole_maps_are_those_of_their_patches(padding):
    x, y, spec = torch.randn(20, 4, 5, 5).double(), torch.randn(20, 6, 5, 5).double(), conv(4, 6, padding=padding)
    assert covers(x, spec, None)
    assert covers(x, spec, 25)
    sums = MomentSums()
    sums.add(x, spec, y, positions=25)
    found, patches, rows = sums.moments("it"), input_patches(x, spec), output_rows(y, spec)
    assert found.count == patches.shape[-1]
    torch.testing.assert_close(found.input_second_moment, patches @ patches.mT / found.count)
    torch.testing.assert_close(found.cross, rows @ patches.mT / found.count)
    torch.testing.assert_close(found.target_mean, rows.mean(-1))
    torch.testing.assert_close(found.target_power, rows.square().mean(-1))


def test_other_layers_are_left_to_their_patches():
    x = torch.randn(2, 4, 5, 5)
    assert not covers(x, conv(4, 6), 24)
    assert not covers(x[0], conv(4, 6), None)
    assert not covers(x, conv(4, 6, stride=(2, 2)), None)
    assert not covers(x, conv(4, 6, padding=(0, 0)), None)
    assert not covers(x, conv(4, 4, groups=2), None)
    assert not covers(x, conv(4, 6, padding_mode="reflect"), None)
