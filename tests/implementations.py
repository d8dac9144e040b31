"""Who computes the loss on which device, and why one of them cannot do so here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fcrn_fused
from fcrn_fused import ops


@dataclass(frozen=True)
class Implementation:
    """A backend on a device, called as a user calls it."""

    backend: str  # "reference" or "fused"
    device: str  # "cpu" or "cuda"

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    @property
    def is_fused(self) -> bool:
        return self.backend == "fused"

    def loss(self, pred: Tensor, target: Tensor, **settings: Any) -> Any:
        return fcrn_fused.fcrn_loss(pred, target, backend=self.backend, **settings)

    def masked_loss(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, **settings: Any
    ) -> Tensor:
        return fcrn_fused.masked_mse_loss(pred, target, weight, backend=self.backend, **settings)

    def module(self, **settings: Any) -> fcrn_fused.FCRNLoss:
        return fcrn_fused.FCRNLoss(backend=self.backend, **settings).to(self.device)

    def why_not(self) -> str | None:
        """Why this one cannot run here; None: it can."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.is_fused:
            return ops.why_not(self.device)
        return None


IMPLEMENTATIONS = tuple(
    Implementation(backend, device)
    for device in ("cpu", "cuda")
    for backend in ("reference", "fused")
)
