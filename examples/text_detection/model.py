"""The fully-convolutional regression network (FCRN), as in the paper and narrow."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["batch", "group", "none"]

# Channels of the five stages. The paper's, and one that a laptop trains in minutes: narrowest
# where the maps are largest.
WIDTHS: dict[str, tuple[int, int, int, int, int]] = {
    "paper": (64, 128, 128, 256, 512),
    "narrow": (8, 16, 32, 64, 96),
}
STRIDES = (8, 16, 32)


class FCRN(nn.Module):
    """Seven linear maps over the grid: six for the pose of a word, the last its confidence.

    With width "paper" and stride 16 the convolutions are the paper's: 64-5, 128-5, 128-3 twice,
    256-3 twice, 512-3 twice, 512-5 and 7-5 (channels-kernel), a 2 x 2 max-pooling after each of
    the first four stages, ReLU after all but the last convolution. Stride 8 leaves out the
    fourth pooling, stride 32 adds a fifth before the last 5 x 5 convolution.

    Pooling and ReLU change places freely, so each stage pools first and has a quarter of the
    work left. The normalisation comes last: what a convolution sees is then centred. Without
    that, the mean of the 25 * 512 values that each confidence is made of makes the loss so steep
    along one direction, once negative cells weigh 1, that SGD diverges at any useful rate.

    forward: pictures (B, 3, H, W), uint8 or floating in [0, 255], H and W multiples of the
    stride -> (B, 7, H / stride, W / stride). Nothing bounds the result: offsets and sines are
    negative as often as not, so no ReLU may follow the last convolution.
    """

    def __init__(self, width: str = "narrow", stride: int = 16, norm: Norm = "batch") -> None:
        super().__init__()
        if width not in WIDTHS:
            raise ValueError(f"width must be one of {', '.join(WIDTHS)}, not {width!r}")
        if stride not in STRIDES:
            raise ValueError(f"stride must be one of {STRIDES}, not {stride!r}")
        one, two, three, four, five = WIDTHS[width]
        self.stride = stride
        self.features = nn.Sequential(
            _convolution(3, one, 5, norm, pool=True),
            _convolution(one, two, 5, norm, pool=True),
            _convolution(two, three, 3, norm),
            _convolution(three, three, 3, norm, pool=True),
            _convolution(three, four, 3, norm),
            _convolution(four, four, 3, norm, pool=stride >= 16),
            _convolution(four, five, 3, norm),
            _convolution(five, five, 3, norm, pool=stride == 32),
            _convolution(five, five, 5, norm),
        )
        self.head = nn.Conv2d(five, 7, 5, padding=2)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        pictures = pictures.to(dtype, memory_format=torch.channels_last) / 127.5 - 1
        return self.head(self.features(pictures))


def _convolution(
    channels_in: int, channels_out: int, kernel: int, norm: Norm, pool: bool = False
) -> nn.Sequential:
    convolution = nn.Conv2d(
        channels_in, channels_out, kernel, padding=kernel // 2, bias=norm == "none"
    )
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    layers: list[nn.Module] = [convolution]
    if pool:
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.ReLU(inplace=True))
    if norm == "batch":
        layers.append(nn.BatchNorm2d(channels_out))
    elif norm == "group":
        layers.append(nn.GroupNorm(max(1, channels_out // 8), channels_out))
    return nn.Sequential(*layers)
