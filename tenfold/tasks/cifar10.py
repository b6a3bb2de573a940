"""CIFAR-10, and its ResNets of He et al. 2016 (arXiv 1512.03385, section 4.2), shortcuts without parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.tasks.base import TASKS
from tenfold.tasks.images import ImageTransform
from tenfold.tasks.in_memory import InMemoryTask, Split, TensorSet, Transform
from tenfold.tasks.parquet import load_images


@TASKS.register("cifar10")
class Cifar10(InMemoryTask):
    """CIFAR-10 and its ResNets of depth 20 to 110; weights from a file, data from Parquet files in the Hub layout.

    The data is looked for in ``data``, else in $TENFOLD_DATA, else in ~/.cache/tenfold/datasets: ``train-*.parquet``
    and ``test-*.parquet`` there or in a folder ``cifar10`` within. Training crops out of a border of 4 pixels and
    mirrors. Batches are channels_last, which these networks run nearly twice as fast on a CPU.
    """

    name: ClassVar[str] = "cifar10"
    extra: ClassVar[str] = "data"
    variants: ClassVar[tuple[str, ...]] = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
    input_shape: ClassVar[tuple[int, ...]] = (3, 32, 32)
    # The mean and spread of ImageNet, as the published weights were trained with.
    transform: ClassVar[Transform] = ImageTransform(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), padding=4, flip=True, channels_last=True
    )
    tune_settings: ClassVar[dict[str, Any]] = {"epochs": 3, "batch_size": 128, "lr": 0.02}

    def architecture(self) -> nn.Module:
        """Return the ResNet that the variant names."""
        return CifarResNet(int(str(self.variant).removeprefix("resnet")))

    def read(self, split: Split) -> TensorSet:
        """Return the pictures as uint8 (samples, 3, 32, 32) and their labels 0..9."""
        where, source = self.data, "uoft-cs/cifar10"
        return load_images("cifar10", split, data=where, shape=self.input_shape, classes=10, source=source)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut that, where the shape changes, subsamples and pads ("option A")."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.padding = (channels - in_channels) // 2  # zero channels before and after

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, channels, height/stride, width/stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        joined: Tensor = self.relu(out + self.shortcut(x))
        return joined

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the input, subsampled and with zero channels on both sides where the block changes its shape."""
        if self.stride == 1 and self.padding == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """A ResNet of depth 6n+2: a 3×3 convolution, three stages of n blocks with 16, 32, 64 channels, a linear head.

    State-dict keys are ``conv1``, ``bn1``, ``layer{1,2,3}.{block}.{conv1,bn1,conv2,bn2}``, ``linear``, as in the
    published weights.

    Args:
        depth: 20, 32, 44, 56, 110 or any other 6n+2.
        classes: width of the head.

    Raises:
        ValueError: the depth is not 6n+2.

    Example:
        >>> sum(p.numel() for p in CifarResNet(20).parameters())
        269722
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            msg = f"a CIFAR ResNet has depth 6n+2 (20, 32, 44, 56, 110, ...), not {depth}"
            raise ValueError(msg)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores (batch, classes) of pictures (batch, 3, 32, 32)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)
