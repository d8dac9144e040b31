"""A user's program that must pass `mypy --strict`, its ignored errors being errors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import fcrn_fused
from fcrn_fused import (
    FCRNLoss,
    FCRNLossStats,
    LinearNegativeWeight,
    StepNegativeWeight,
    fcrn_loss,
    masked_mse_loss,
)

Batch = tuple[Tensor, Tensor]


def train(network: nn.Module, batches: Iterable[Batch]) -> list[float]:
    loss = FCRNLoss(coord_weight=(1.0, 1.0, 2.0, 2.0, 1.0, 1.0), ignore_value=-1.0)
    schedule = StepNegativeWeight(loss, step_size=10)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    losses: list[float] = []
    for pictures, target in batches:
        error: Tensor = loss(network(pictures), target)
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        schedule.step()
        losses.append(error.item())
    state: dict[str, object] = schedule.state_dict()
    schedule.load_state_dict(state)
    return losses


def positive_cells(pred: Tensor, target: Tensor) -> int:
    loss, stats = fcrn_loss(pred, target, negative_weight=torch.tensor(0.5), return_stats=True)
    return named(stats)["num_positive"] + int(loss.isnan())


def without_stats(pred: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = fcrn_loss(pred, target, coord_weight=[1.0] * 6, return_stats=False)
    return loss + fcrn_loss(pred, target) + masked_mse_loss(pred, target, target > 0)


def mistakes(pred: Tensor, target: Tensor) -> None:
    fcrn_loss(pred, target, negative_wieght=0.5)  # type: ignore[call-overload]
    fcrn_loss(pred, target, reduction=1, return_stats=True)  # type: ignore[call-overload]
    loss: Tensor = fcrn_loss(pred, target, return_stats=True)  # type: ignore[assignment]
    print(loss)


def named(stats: FCRNLossStats) -> dict[str, int]:
    return {"num_positive": int(stats.num_positive.item())}


def weight_after(loss: FCRNLoss, steps: int) -> float:
    schedule = LinearNegativeWeight(loss, final=0.5, total_iters=steps)
    for _ in range(steps):
        schedule.step()
    weight: Tensor = loss.negative_weight
    return schedule.get_last_weight() + weight.item()


if __name__ == "__main__":
    maps = torch.rand(2, 7, 4, 4), torch.rand(2, 7, 4, 4).round()
    batch = torch.rand(2, 3, 4, 4), maps[1]
    print(train(nn.Conv2d(3, 7, 1), [batch]), positive_cells(*maps))
    print(without_stats(*maps))
    print(weight_after(FCRNLoss(), 3), fcrn_fused.show_config(), fcrn_fused.__version__)
