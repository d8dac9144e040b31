"""The snippet of 2017 beside the loss it meant: what is swapped, scrambled, and too large.

Keras issue 5087 asked why this loss gives tens of thousands. `examples/text_detection` has it in
PyTorch, line by line.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batches import make_batch
from implementations import Implementation

WEIGHT = 0.01
EXAMPLE = Path(__file__).parent.parent / "examples" / "text_detection" / "keras_snippet.py"


def load_snippet() -> Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """By its path: the example is no part of the package."""
    spec = importlib.util.spec_from_file_location("keras_snippet", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = module.keras_snippet_loss
    return loss


keras_snippet = load_snippet()


def unscrambled_snippet(y_pred: torch.Tensor, y_true: torch.Tensor, weight: float) -> torch.Tensor:
    """The same terms, the seven of a cell beside each other."""
    c = y_true[:, 6:]
    pose = torch.where(c <= 0, weight, c) * (y_pred - y_true)[:, :6] ** 2
    confidence = c * (y_pred - y_true)[:, 6:] ** 2
    return torch.cat([pose, confidence], 1).mean(1)


def batch(device: str, positives: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    return make_batch((2, 7, 16, 16), device=device, positives=positives, dtype=torch.float64)


def test_negative_cells_get_no_gradient_of_confidence(impl: Implementation) -> None:
    """So nothing pushes a confidence down; with the loss, everything does."""
    pred, target = batch(impl.device)
    negative = target[:, 6] == 0
    keras_snippet(pred, target, WEIGHT).mean().backward()
    assert (pred.grad[:, 6][negative] == 0).all()
    assert (pred.grad[:, 6][~negative] != 0).all()

    pred.grad = None
    impl.loss(pred, target, negative_weight=WEIGHT).backward()
    assert (pred.grad[:, 6][negative] != 0).all()


def test_negative_cells_pay_the_weight_times_their_pose_error(impl: Implementation) -> None:
    pred, target = batch(impl.device, positives=0.0)
    numel = pred.numel()
    (grad,) = torch.autograd.grad(keras_snippet(pred, target, WEIGHT).mean(), pred)
    want = 2 * WEIGHT * (pred - target).detach()[:, :6] / numel
    torch.testing.assert_close(grad[:, :6], want)
    (grad,) = torch.autograd.grad(impl.loss(pred, target, negative_weight=WEIGHT), pred)
    assert (grad[:, :6] == 0).all()
    want = 2 * WEIGHT * (pred - target).detach()[:, 6] / numel
    torch.testing.assert_close(grad[:, 6], want)


def test_mask_and_weight_are_swapped_and_nothing_else(impl: Implementation) -> None:
    """The snippet's mean is the loss with the roles of pose and confidence of negatives swapped."""
    pred, target = batch(impl.device)
    loss, stats = impl.loss(
        pred, target, negative_weight=WEIGHT, reduction="sum", return_stats=True
    )
    squared = (pred - target).detach() ** 2
    negative = (target[:, 6:] == 0).double()
    negative_pose = WEIGHT * (negative * squared[:, :6]).sum()
    snippet = keras_snippet(pred, target, WEIGHT).mean() * pred.numel()
    torch.testing.assert_close(snippet, loss - stats.negative_conf + negative_pose)


def test_the_axis_is_scrambled_and_the_overall_mean_is_not(impl: Implementation) -> None:
    pred, target = batch(impl.device)
    snippet = keras_snippet(pred, target, WEIGHT)
    straight = unscrambled_snippet(pred, target, WEIGHT)
    assert snippet.shape == straight.shape == (2, 16, 16)
    differing = ~torch.isclose(snippet, straight, rtol=1e-3)
    assert differing.double().mean() > 0.9, "cells are means of other cells' terms"
    torch.testing.assert_close(snippet.mean(), straight.mean())
    gradients = [torch.autograd.grad(x.mean(), pred)[0] for x in (snippet, straight)]
    torch.testing.assert_close(*gradients)


def test_the_scrambled_axis_is_a_mean_over_neighbours_not_features(impl: Implementation) -> None:
    """One cell with an error: the loss puts it there, the snippet spreads it elsewhere."""
    target = torch.zeros((1, 7, 16, 16), dtype=torch.float64, device=impl.device)
    target[0, 6, 5, 9] = 1
    pred = target.clone()
    pred[0, :, 5, 9] += 1
    per_cell = impl.loss(pred, target, reduction="cell")
    assert per_cell.nonzero().tolist() == [[0, 5, 9]]
    assert per_cell[0, 5, 9] == 1
    snippet = keras_snippet(pred, target, WEIGHT)
    assert len(snippet.nonzero()) > 1
    assert snippet.max() < 1
    torch.testing.assert_close(snippet.sum(), per_cell.sum())


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_a_pose_in_pixels_costs_18725_a_cell(impl: Implementation, share: float) -> None:
    """256 pixels off in x and in y: 2 * 256^2 / 7; in units of the image it is 0.57."""
    target = torch.zeros((4, 7, 16, 16), device=impl.device)
    positive = torch.rand((4, 16, 16), generator=torch.Generator().manual_seed(0)) < share
    target[:, 6] = positive.to(impl.device)
    pred = target.clone()
    pred[:, :2] += 256
    per_cell = impl.loss(pred, target, reduction="cell")
    assert per_cell[positive].unique().tolist() == [pytest.approx(18_725, abs=0.5)]
    assert (per_cell[~positive] == 0).all()
    pred[:, :2] = target[:, :2] + 256 / 512
    assert impl.loss(pred, target, reduction="cell").max().item() == pytest.approx(0.5 / 7)


def test_the_swap_lets_pixels_in_negative_labels_count(impl: Implementation) -> None:
    """Leftover pixel coordinates in cells without a box: masked by the loss, not by the snippet."""
    target = torch.zeros((1, 7, 16, 16), device=impl.device)
    target[:, :2] = 256.0
    pred = torch.zeros_like(target)
    assert impl.loss(pred, target, negative_weight=WEIGHT).item() == 0
    snippet = keras_snippet(pred, target, WEIGHT).mean().item()
    assert snippet == pytest.approx(WEIGHT * 2 * 256**2 / 7, rel=1e-5)


@pytest.mark.parametrize(("weight", "optimum"), [(1.0, 0.02), (0.01, 0.671), (0.1, 0.169)], ids=str)
def test_the_optimum_of_a_constant_confidence(
    impl: Implementation, weight: float, optimum: float
) -> None:
    """c* = p / (p + w (1 - p)): the collapse at w = 1, and what the small weight does about it."""
    share = 0.02
    target = torch.zeros((1, 7, 50, 100), dtype=torch.float64, device=impl.device)
    target.view(1, 7, -1)[0, 6, : round(share * 5000)] = 1
    confidence = torch.tensor(0.5, dtype=torch.float64, device=impl.device, requires_grad=True)

    def loss(c: torch.Tensor, function=None) -> torch.Tensor:
        pred = torch.cat([target[:, :6], c.expand(1, 1, 50, 100)], 1)
        if function is not None:
            return function(pred, target, weight).mean()
        return impl.loss(pred, target, negative_weight=weight, reduction="sum")

    # a parabola: one Newton step from anywhere is its minimum
    (slope,) = torch.autograd.grad(loss(confidence), confidence, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, confidence)
    best = (confidence - slope / curvature).item()
    assert best == pytest.approx(share / (share + weight * (1 - share)))
    assert best == pytest.approx(optimum, abs=5e-4)

    # the snippet's optimum is 1, whatever the weight
    (slope,) = torch.autograd.grad(loss(confidence, keras_snippet), confidence, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, confidence)
    assert (confidence - slope / curvature).item() == pytest.approx(1.0)


def test_collapse_in_training(impl: Implementation) -> None:
    """A bias alone, trained: with weight 1 it says "no text", with 0.01 it does not."""
    _, target = make_batch((4, 7, 32, 32), device=impl.device, positives=0.02)
    share = (target[:, 6] > 0).float().mean().item()
    for weight in (1.0, WEIGHT):
        bias = torch.full((1,), 0.5, device=impl.device, requires_grad=True)
        optimiser = torch.optim.SGD([bias], lr=5.0 if weight < 1 else 0.5)
        for _ in range(200):
            optimiser.zero_grad()
            pred = torch.cat([target[:, :6], bias.expand(4, 1, 32, 32)], 1)
            impl.loss(pred, target, negative_weight=weight).backward()
            optimiser.step()
        assert bias.item() == pytest.approx(share / (share + weight * (1 - share)), abs=0.02)
