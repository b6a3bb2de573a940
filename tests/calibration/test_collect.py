"""Moments must be those of the patches that torch's own layers multiply."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenfold.calibration.collect import collect_moments, measurable
from tenfold.calibration.im2col import input_patches, output_rows
from tenfold.calibration.moment_sums import moment_bytes
from tenfold.decompositions import Moments
from tenfold.errors import CalibrationWarning, DataError
from tenfold.formats import split_groups
from tenfold.layers import spec_of

LAYERS = [
    (nn.Linear(5, 4), (3, 7, 5)),
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
    (nn.Conv2d(4, 6, 3, padding=1), (4, 5, 7)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2), (2, 4, 8, 7)),
    (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 8, 7)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 8, 7)),
    (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 8, 7)),
    (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 8, 7)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"), (2, 4, 8, 7)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 1)), (2, 2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 3), padding=(2, 0), dilation=(1, 2), groups=2), (2, 4, 5, 6)),
    (nn.ConvTranspose1d(4, 6, 5, stride=2, padding=4), (2, 4, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
@pytest.mark.parametrize("positions", [None, 7])
def test_weight_times_patches_is_the_output(layer, shape, positions):
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    spec, _ = spec_of(layer)
    options = {} if positions is None else {"positions": positions, "seed": 3}
    weight = split_groups(layer.weight, spec).flatten(2)
    with torch.no_grad():
        made = weight @ input_patches(x, spec, **options) + layer.bias.view(spec.groups, -1, 1)
        wanted = output_rows(layer(x), spec, **options)
    torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize(
    ("layer", "shape"), LAYERS[:5] + LAYERS[9:12], ids=lambda v: str(v) if isinstance(v, nn.Module) else ""
)
def test_moments_are_those_of_all_patches_of_all_batches(layer, shape):
    layer = layer.float()
    batches = [torch.randn(shape) for _ in range(3)]
    spec, _ = spec_of(layer)
    rows = torch.cat([input_patches(b, spec).mT for b in batches], dim=1)
    found = collect_moments(layer, batches, {"": spec})[""]
    wanted = Moments.of(rows)
    assert found.count == wanted.count
    torch.testing.assert_close(found.input_second_moment, wanted.input_second_moment, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-5, atol=1e-6)


def test_targets_are_the_dense_outputs_without_their_bias():
    dense = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))
    other = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))
    batches = [torch.randn(8, 3, 6, 6) for _ in range(2)]
    found = collect_moments(other, batches, dense=dense)["2"]
    spec, _ = spec_of(dense[2])
    with torch.no_grad():
        x = torch.cat([input_patches(other[:2](b), spec)[0].t() for b in batches])
        y = torch.cat([output_rows(dense(b) - dense[2].bias.view(-1, 1, 1), spec)[0].t() for b in batches])
    wanted = Moments.of(x, y)
    for name in ("input_second_moment", "cross", "target_mean", "target_power"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)


def test_transformers_run_layer_by_layer_and_stay_as_they_were():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train()
    found = collect_moments(
        layer, [torch.randn(4, 30, 8)], {k: v for k, v in measurable(layer).items() if "attn" not in k}
    )
    assert {p: m.count for p, m in found.items()} == {"linear1": 120, "linear2": 120}
    assert layer.training
    assert not layer.linear1._forward_pre_hooks


def test_few_rows_are_warned_about_with_the_number_needed():
    """In the words of the layer: a linear one has inputs, a convolution patches."""
    with pytest.warns(CalibrationWarning, match=r"has 20 inputs, and 6 rows .* 20 are needed.*4 to 40 times") as caught:
        collect_moments(nn.Linear(20, 3), [torch.randn(6, 20)])
    assert "patch" not in str(caught[0].message)
    assert "positions" not in str(caught[0].message)
    with pytest.warns(CalibrationWarning, match=r"patches of 27 numbers enter it, and 8 of them were seen.*positions"):
        collect_moments(nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 4, 4)])


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(DataError, match="no calibration batches"):
        collect_moments(nn.Linear(2, 3), [])
    with pytest.raises(DataError, match="not finite"):
        collect_moments(nn.Linear(2, 3), [torch.full((4, 2), float("nan"))])
    with pytest.raises(DataError, match="never reaches"):
        collect_moments(nn.Sequential(nn.Linear(2, 3)), [torch.randn(4, 2)], forward=lambda m, b: b)


def test_subsampled_positions_are_seeded_and_unbiased():
    layer, x = nn.Conv2d(2, 3, 3, padding=1), [torch.randn(16, 2, 12, 12) for _ in range(8)]
    some, again, whole = (collect_moments(layer, x, positions=p)[""] for p in (36, 36, None))
    assert some.count == 8 * 16 * 36
    assert torch.equal(some.input_second_moment, again.input_second_moment)
    assert (some.input_second_moment - whole.input_second_moment).abs().max() < 0.1


def test_bytes_are_what_the_moments_take():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2))
    found = collect_moments(model, [torch.randn(30, 4, 3, 3)], dense=model)
    stored = sum(t.numel() * 8 for m in found.values() for t in vars(m).values() if isinstance(t, torch.Tensor))
    assert stored == moment_bytes(measurable(model), targets=True)
