"""Layers of which another network predicts a small part from one example, and a siamese network made of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import WeightError


class PredictedLinear(nn.Module):
    """y = M'·diag(w)·M·x + b with w given for each sample: a linear layer of which only a diagonal is predicted.

    Bertinetto et al. 2016, arXiv 1606.05233, equation 6. Use it where a whole matrix in · out would have to be
    predicted: here it is ``width`` numbers.

    Args:
        in_features: of the input.
        out_features: of the output.
        width: of the diagonal, the smaller of both sides when left out.

    Example:
        >>> layer = PredictedLinear(8, 4)
        >>> layer(torch.randn(3, 8), torch.ones(3, layer.predicted)).shape, layer.predicted
        (torch.Size([3, 4]), 4)
    """

    def __init__(self, in_features: int, out_features: int, width: int | None = None, **place: Any) -> None:
        super().__init__()
        self.predicted = width or min(in_features, out_features)
        self.inner = nn.Linear(in_features, self.predicted, bias=False, **place)
        self.outer = nn.Linear(self.predicted, out_features, **place)

    def forward(self, x: Tensor, diagonal: Tensor) -> Tensor:
        """Return outputs (batch, ..., out) of inputs (batch, ..., in) under diagonals (batch, width)."""
        _check_predicted(diagonal, (x.shape[0], self.predicted))
        between = [1] * (x.dim() - 2)
        out: Tensor = self.outer(self.inner(x) * diagonal.view(x.shape[0], *between, -1))
        return out


class PredictedConv2d(nn.Module):
    """A 1×1 convolution, a depthwise one whose filters are given for each sample, and a 1×1 convolution.

    Bertinetto et al. 2016, arXiv 1606.05233, equation 8: f²·width numbers are predicted where the whole convolution has
    f²·in·out. Use it to condition a convolution on another input. Filters are scaled to norm 1, so that the size of
    what is predicted does not matter.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: f, odd; the size of the picture stays.
        width: channels in between, as many as go in when left out.

    Raises:
        WeightError: an even kernel.

    Example:
        >>> layer = PredictedConv2d(8, 16, 3)
        >>> layer.predicted, layer(torch.randn(2, 5, 8, 7, 7), torch.randn(2, 72)).shape
        (72, torch.Size([2, 5, 16, 7, 7]))
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, width: int | None = None, **place: Any
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            msg = f"kernel_size={kernel_size} is odd, so that pictures keep their size"
            raise WeightError(msg)
        self.kernel_size, self.width = kernel_size, width or in_channels
        self.predicted = self.width * kernel_size**2
        self.inner = nn.Conv2d(in_channels, self.width, 1, bias=False, **place)
        self.outer = nn.Conv2d(self.width, out_channels, 1, **place)

    def forward(self, x: Tensor, filters: Tensor) -> Tensor:
        """Return (batch, group, out, rows, columns) of (batch, group, in, ...) under filters (batch, width · f²).

        All pictures of a group are convolved with the same filters.
        """
        _check_predicted(filters, (x.shape[0], self.predicted))
        weight = F.normalize(filters.unflatten(1, (self.width, -1)), dim=2)
        middle = convolved(self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]), weight, self.width, self.kernel_size)
        out: Tensor = self.outer(middle.flatten(0, 1)).unflatten(0, x.shape[:2])
        return out


class WholeConv2d(nn.Module):
    """A convolution all of whose weights are given for each sample: f²·in·out numbers.

    Use it for comparison with ``PredictedConv2d``.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: f, odd; the size of the picture stays.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **place: Any) -> None:
        super().__init__()
        self.kernel_size, self.sides = kernel_size, (out_channels, in_channels)
        self.predicted = in_channels * out_channels * kernel_size**2
        self.bias = nn.Parameter(torch.zeros(out_channels, **place))

    def forward(self, x: Tensor, filters: Tensor) -> Tensor:
        """Return (batch, group, out, rows, columns) of (batch, group, in, ...) under filters (batch, f² · in · out)."""
        _check_predicted(filters, (x.shape[0], self.predicted))
        weight = F.normalize(filters.unflatten(1, (self.sides[0], -1)), dim=2).flatten(0, 1)
        batch, out = x.shape[0], self.sides[0]
        weight = weight.view(batch * out, self.sides[1], self.kernel_size, self.kernel_size)
        wide = F.conv2d(x.transpose(0, 1).flatten(1, 2), weight, padding=self.kernel_size // 2, groups=batch)
        found: Tensor = wide.unflatten(1, (batch, out)).transpose(0, 1) + self.bias[:, None, None]
        return found


def convolved(x: Tensor, filters: Tensor, width: int, size: int) -> Tensor:
    """Return the depthwise convolution of (batch, group, width, ...) with filters (batch, width, f²), one set a sample.

    The samples become channels of one grouped convolution.
    """
    batch = x.shape[0]
    weight = filters.reshape(batch * width, 1, size, size)
    wide = F.conv2d(x.transpose(0, 1).flatten(1, 2), weight, padding=size // 2, groups=batch * width)
    found: Tensor = wide.unflatten(1, (batch, width)).transpose(0, 1)
    return found


def _check_predicted(given: Tensor, wanted: tuple[int, int]) -> None:
    if tuple(given.shape) != wanted:
        msg = f"what is predicted has the shape {tuple(given.shape)}; {wanted} is asked for, one row for each sample"
        raise WeightError(msg)


SiameseKind = Literal["learnet", "shared", "whole"]


class OneShotSiamese(nn.Module):
    """Whether a picture shows what an exemplar shows: a siamese network whose middle layer the exemplar decides.

    Use it for one-shot decisions. Features φ of both pictures are compared by a weighted distance, Σ aᵢ·|φᵢ(z) − φᵢ(x)|
    + c, whose logistic loss is trained on pairs. Three convolutions; the filters of the second are predicted from the
    exemplar z by a network of the same kind (``learnet``: a depthwise core of Bertinetto et al. 2016), are all
    predicted (``whole``), or are its own (``shared``: Koch et al. 2015).

    Args:
        channels: of the first two convolutions; the third has twice as many.
        kind: ``learnet``, ``shared`` or ``whole``.
        side: rows and columns of the pictures, a multiple of 4.

    Raises:
        WeightError: an unknown kind, or a side that is no multiple of 4.

    Example:
        >>> OneShotSiamese(8)(torch.randn(3, 1, 28, 28), torch.randn(3, 5, 1, 28, 28)).shape
        torch.Size([3, 5])
    """

    def __init__(self, channels: int = 32, kind: SiameseKind = "learnet", *, side: int = 28) -> None:
        super().__init__()
        if kind not in {"learnet", "shared", "whole"} or side % 4:
            msg = f"kind={kind!r}, side={side}: a kind is learnet, shared or whole, a side a multiple of 4"
            raise WeightError(msg)
        self.kind = kind
        self.first = _block(1, channels, 5)
        self.middle: nn.Module
        self.predictor: nn.Module | None = None
        if kind == "shared":
            self.middle = nn.Conv2d(channels, channels, 3, padding=1)
        else:
            make = PredictedConv2d if kind == "learnet" else WholeConv2d
            self.middle = made = make(channels, channels, 3)
            self.predictor = nn.Sequential(
                _block(1, channels, 5),
                _block(channels, channels, 3),
                nn.Flatten(),
                nn.Linear(channels * (side // 4) ** 2, made.predicted),
            )
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU()
        )
        self.code = nn.Linear(2 * channels * (side // 4) ** 2, 128)
        self.scale = nn.Parameter(torch.full((128,), -0.1))
        self.shift = nn.Parameter(torch.zeros(()))

    def features(self, x: Tensor, predicted: Tensor | None) -> Tensor:
        """Return φ (batch, group, 128) of pictures (batch, group, 1, side, side)."""
        seen = self.first(x.flatten(0, 1))
        if predicted is None:
            seen = self.middle(seen)
        else:
            seen = self.middle(seen.unflatten(0, x.shape[:2]), predicted).flatten(0, 1)
        seen = F.max_pool2d(self.norm(seen).relu(), 2)
        found: Tensor = self.code(self.last(seen).flatten(1)).sigmoid().unflatten(0, x.shape[:2])
        return found

    def forward(self, exemplars: Tensor, pictures: Tensor) -> Tensor:
        """Return a score (batch, group) of pictures (batch, group, 1, side, side) and exemplars (batch, 1, side, side).

        Scores above 0 say that both show the same.
        """
        predicted = None if self.predictor is None else self.predictor(exemplars)
        every = torch.cat([exemplars[:, None], pictures], 1)
        found = self.features(every, predicted)
        return (found[:, 1:] - found[:, :1]).abs() @ self.scale + self.shift


def _block(inputs: int, outputs: int, size: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))
