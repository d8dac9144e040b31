"""The network: its layers, its strides, its unbounded head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples.text_detection.model import FCRN


def test_the_wide_network_has_the_layers_of_the_paper() -> None:
    layers = [
        (module.out_channels, module.kernel_size[0])
        for module in FCRN("paper").modules()
        if isinstance(module, nn.Conv2d)
    ]
    first = [(64, 5), (128, 5), (128, 3), (128, 3), (256, 3), (256, 3)]
    assert layers == [*first, (512, 3), (512, 3), (512, 5), (7, 5)]
    assert sum(isinstance(module, nn.MaxPool2d) for module in FCRN("paper").modules()) == 4


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_map_has_a_cell_for_every_stride_of_pixels(stride: int, norm: str) -> None:
    model = FCRN(stride=stride, norm=norm)
    pictures = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert model(pictures).shape == (2, 7, 64 // stride, 96 // stride)


def test_outputs_of_both_signs_can_be_predicted() -> None:
    pred = FCRN()(torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8))
    assert (pred < 0).any(dim=0).any(dim=1).any(dim=1).all()
    assert (pred > 0).any(dim=0).any(dim=1).any(dim=1).all()


def test_bytes_and_floats_are_the_same_picture() -> None:
    model = FCRN().eval()
    pictures = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(model(pictures), model(pictures.float()))


def test_a_width_or_stride_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="width must be one of paper, narrow, not 'wide'"):
        FCRN("wide")
    with pytest.raises(ValueError, match=r"stride must be one of \(8, 16, 32\), not 4"):
        FCRN(stride=4)
