"""The question of 2017: the snippet as it was, pixels and back, the figure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import flags
from torch import nn

from examples.text_detection import keras_question
from examples.text_detection.grid import Grid
from examples.text_detection.keras_snippet import keras_snippet_loss


def maps(positives: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    pred, target = torch.randn(2, 7, 16, 16, dtype=torch.float64), torch.rand(2, 7, 16, 16).double()
    target[:, 6] = (target[:, 6] < positives).double()
    return pred.requires_grad_(), target


def test_the_snippet_takes_the_weight_for_the_mask() -> None:
    pred, target = maps()
    keras_snippet_loss(pred, target, 0.01).mean().backward()
    error = 2 * (pred - target).detach() / pred.numel()
    positive = target[:, 6:] == 1
    expected = torch.cat(
        [torch.where(positive, error[:, :6], 0.01 * error[:, :6]), error[:, 6:] * positive], dim=1
    )
    torch.testing.assert_close(pred.grad, expected)


def test_the_snippet_scrambles_cells_but_not_their_mean() -> None:
    pred, target = maps()
    scrambled = keras_snippet_loss(pred, target, 0.01)
    mask = torch.where(target[:, 6:] <= 0, 0.01, target[:, 6:])
    weight = torch.cat([mask.expand(-1, 6, -1, -1), target[:, 6:]], dim=1)
    by_cell = (weight * (pred - target) ** 2).mean(dim=1)
    assert scrambled.shape == by_cell.shape == (2, 16, 16)
    assert not torch.allclose(scrambled, by_cell)
    torch.testing.assert_close(scrambled.mean(), by_cell.mean())


def test_poses_go_to_pixels_and_back() -> None:
    target = torch.rand(2, 7, 16, 16)
    target[:, 6] = (target[:, 6] < 0.3).float()
    target = torch.where(target[:, 6:] > 0, target, 0.0)
    pixels = keras_question.PixelPose(nn.Identity(), Grid())
    coded = pixels.target(target)
    assert coded[:, :4].max() > 100
    assert (coded[:, 6] == target[:, 6]).all()
    positive = (target[:, 6:] > 0).expand_as(target)
    torch.testing.assert_close(pixels(coded)[positive], target[positive], rtol=1e-4, atol=1e-4)


def test_the_command_leaves_its_figure_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = flags(steps=1, pictures=1, size=64, workers=0, out=tmp_path)
    with pytest.warns(UserWarning, match="look like pixels"):
        keras_question.main(options)
    assert (tmp_path / "keras_question.png").stat().st_size > 10_000
    rows = (tmp_path / "keras_question.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["variant", "a", "b", "c", "d"]
    assert "(d) as (c), pose in pixels: loss" in capsys.readouterr().out
