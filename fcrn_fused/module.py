"""`FCRNLoss`: the loss as a module, with a weight that a schedule can anneal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .functional import fcrn_loss
from .stats import FCRNLossStats
from .validation import (
    check_backend,
    check_coord_values,
    check_ignore_value,
    check_reduction,
    check_weight,
)


class FCRNLoss(nn.Module):
    """`fcrn_loss` as a module; the keywords are the same.

    `negative_weight` is a buffer, a 0-dim float32 tensor whatever dtype the module is moved to: it
    is in `state_dict()`, follows `.to(device)`, and may be filled in place while training, between
    replays of a CUDA graph too, without recompilation or synchronisation. `StepNegativeWeight` and
    `LinearNegativeWeight` do that. A `coord_weight` given as a tensor follows `.to(device)` too.

    Shapes: `pred` and `target` (B, C, *S), C - 1 pose maps and one confidence map; see `fcrn_loss`
    for units, dtypes and what the reductions return.

    Raises:
        TypeError: a weight is not a number.
        ValueError: a weight, `ignore_value`, `reduction` or `backend` that does not fit.
    """

    negative_weight: Tensor

    def __init__(
        self,
        *,
        negative_weight: float | Tensor = 1.0,
        positive_weight: float = 1.0,
        coord_weight: float | Sequence[float] | Tensor = 1.0,
        ignore_value: float | None = None,
        reduction: str = "mean",
        return_stats: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(negative_weight, Tensor):
            weight = _constant("negative_weight", negative_weight).to(torch.float32).clone()
            if weight.dim() != 0:
                raise ValueError(
                    "negative_weight must be a number or a 0-dim tensor, "
                    f"got shape {tuple(weight.shape)}"
                )
        else:
            weight = torch.tensor(
                check_weight("negative_weight", negative_weight), dtype=torch.float32
            )
        self.register_buffer("negative_weight", weight)
        self.positive_weight = check_weight("positive_weight", positive_weight)
        if isinstance(coord_weight, Tensor):
            constant = _constant("coord_weight", coord_weight).clone()
            self.register_buffer("coord_weight", constant, persistent=False)
        else:
            check_coord_values(coord_weight)
            self.coord_weight = coord_weight
        self.ignore_value = check_ignore_value(ignore_value)
        self.reduction = check_reduction(reduction)
        self.return_stats = return_stats
        self.backend = check_backend(backend)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor | tuple[Tensor, FCRNLossStats]:
        """The loss of `pred` against `target`, both (B, C, *S); as `fcrn_loss` returns it."""
        return fcrn_loss(
            pred,
            target,
            negative_weight=self.negative_weight,
            positive_weight=self.positive_weight,
            coord_weight=self.coord_weight,
            ignore_value=self.ignore_value,
            reduction=self.reduction,
            return_stats=self.return_stats,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings, with the weight as it is now."""
        settings: dict[str, Any] = {
            "negative_weight": _shown(self.negative_weight),
            "positive_weight": self.positive_weight,
            "coord_weight": self.coord_weight,
            "ignore_value": self.ignore_value,
            "reduction": self.reduction,
        }
        if self.return_stats:
            settings["return_stats"] = True
        if self.backend != "auto":
            settings["backend"] = self.backend
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FCRNLoss:
        """Move the weights, but leave their dtype: 0.01 has no faithful float16 or bfloat16."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _constant(name: str, weight: Tensor) -> Tensor:
    if weight.requires_grad:
        raise ValueError(
            f"{name} is a constant and must not require grad, got requires_grad=True; detach() it"
        )
    if not weight.dtype.is_floating_point:
        raise ValueError(f"{name} must have a floating dtype, got {weight.dtype}")
    return weight


def _shown(weight: Tensor) -> float | str:
    if weight.is_meta:
        return "meta"
    return float(f"{weight.item():.6g}")  # 0.01, not 0.009999999776482582
