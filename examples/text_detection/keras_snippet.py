"""The loss of the 2017 question (Keras issue 5087), line by line in PyTorch, faults included."""

from __future__ import annotations

import torch
from torch import Tensor


def keras_snippet_loss(y_pred: Tensor, y_true: Tensor, weight: float) -> Tensor:
    """What the snippet computes for maps (B, 7, H, W): (B, H, W), of which Keras takes the mean.

    It is not the loss it was meant to be. The weight is written into the confidence that masks
    the *pose* error, so negative cells pay `weight` times their pose error; their confidence
    error was multiplied by the confidence 0 before, so nothing ever pushes a confidence down.
    And `K.concatenate` joins along the last axis, so the reshape mixes features and cells:
    the mean over axis 1 is not that of a cell's seven features, though the mean of all is right.
    """
    batch, _, height, width = y_true.shape
    loss = torch.square(y_pred - y_true)

    images = []
    for i in range(batch):
        c = y_true[i, 6].reshape(1, height, width)
        final_c = c * loss[i, 6]
        c = torch.where(c <= 0, weight, c)  # T.set_subtensor gives a new tensor, final_c stays

        parts = [c * loss[i, j].reshape(1, height, width) for j in range(6)]
        parts.append(final_c)

        images.append(torch.cat(parts, dim=-1))  # K.concatenate's default axis is the last

    return torch.cat(images, dim=-1).reshape(batch, 7, height, width).mean(dim=1)
