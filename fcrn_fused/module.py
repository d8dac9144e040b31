"""The losses as modules. `FCRNLoss` has a weight that a schedule can anneal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .functional import loss_by_rule, masked_mse_loss
from .reductions import MASKED_REDUCTIONS
from .stats import FCRNLossStats
from .validation import (
    Rule,
    check_backend,
    check_coord_weight,
    check_ignore_value,
    check_negative_weight,
    check_reduction,
    check_weight,
)

_CHECKS: dict[str, Callable[[Any], Any]] = {
    "negative_weight": check_negative_weight,
    "positive_weight": partial(check_weight, "positive_weight"),
    "coord_weight": check_coord_weight,
    "ignore_value": check_ignore_value,
    "reduction": check_reduction,
    "backend": check_backend,
}


class FCRNLoss(nn.Module):
    """`fcrn_loss` as a module with the same keywords.

    `negative_weight` is a buffer, a 0-dim float32 tensor. To anneal it during training, fill it in
    place, as `StepNegativeWeight` and `LinearNegativeWeight` do: this needs no synchronisation or
    recompilation and works between replays of a CUDA graph. A `coord_weight` given as a tensor is
    copied into a buffer too, like the `weight` of `nn.CrossEntropyLoss`. Numbers, NumPy's included,
    are kept as Python floats.

    Both buffers are in `state_dict()` and follow `.to(device)`. They keep their dtype when the
    module is cast or loads a checkpoint of another dtype.

    Shapes: `pred` and `target` are (B, C, *S), with C - 1 pose maps and one confidence map. See
    `fcrn_loss` for units, dtypes and the results of the reductions.

    Raises:
        TypeError: a weight or `ignore_value` is not a number.
        ValueError: a weight, `ignore_value`, `reduction` or `backend` is not valid. Attributes that
            are set later are checked too.
    """

    negative_weight: Tensor
    positive_weight: float
    coord_weight: float | tuple[float, ...] | Tensor
    ignore_value: float | None
    reduction: str
    backend: str

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
        # The values for reset_parameters(), by the name of the buffer.
        self._initial: dict[str, float | list[float] | None] = {}
        self._register_weight("negative_weight", check_negative_weight(negative_weight))
        checked = check_coord_weight(coord_weight)
        if isinstance(checked, Tensor):
            self._register_weight("coord_weight", checked, checked.dtype)
        else:
            self.coord_weight = checked
        self.positive_weight = positive_weight
        self.ignore_value = ignore_value
        self.reduction = reduction
        self.return_stats = return_stats
        self.backend = backend

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        positive: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, FCRNLossStats]:
        """`fcrn_loss` of `pred` and `target`, both (B, C, *S), with the settings of this module."""
        rule = self._rule(self.reduction, weight, positive)
        return loss_by_rule(pred, target, rule, self.return_stats, self.backend)

    def _rule(
        self, reduction: str, weight: Tensor | None = None, positive: Tensor | None = None
    ) -> Rule:
        return Rule(
            self.negative_weight,
            self.positive_weight,
            self.coord_weight,
            self.ignore_value,
            reduction,
            weight,
            positive,
        )

    def reset_parameters(self) -> None:
        """Fill both buffers with the values given at construction.

        Call this after `to_empty()`, which leaves the buffers uninitialised.

        Raises:
            RuntimeError: a weight was given as a tensor on the meta device, which has no values.
        """
        for name, values in self._initial.items():
            if values is None:
                raise RuntimeError(
                    f"{name} was given as a tensor on the meta device, which has no values; "
                    "give numbers, or load a state_dict"
                )
            getattr(self, name).copy_(torch.tensor(values, dtype=torch.float64, device="cpu"))

    def extra_repr(self) -> str:
        """The settings, with the current negative weight."""
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

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a setting when it is set, so that `forward` does not have to."""
        super().__setattr__(name, _CHECKS[name](value) if name in _CHECKS else value)

    def _register_weight(
        self, name: str, weight: float | Tensor, dtype: torch.dtype = torch.float32
    ) -> None:
        if isinstance(weight, Tensor):
            buffer = weight.detach().to(dtype, copy=True)
            self._initial[name] = None if weight.is_meta else weight.tolist()
        else:
            buffer = torch.tensor(weight, dtype=dtype)
            self._initial[name] = weight
        self.register_buffer(name, buffer)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FCRNLoss:
        """Move the weights but keep their dtype: 0.01 is not representable in half precision."""
        before = {name: self._buffers[name] for name in self._initial}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the dtype of the weights even if `assign=True` takes the checkpoint's tensors."""
        for name in self._initial:
            if isinstance(loaded := state_dict.get(prefix + name), Tensor):
                state_dict[prefix + name] = loaded.to(getattr(self, name).dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MaskedMSELoss(nn.Module):
    """`masked_mse_loss` as a module.

    Shapes: `pred` and `target` have the same shape, of any number of dimensions, and `weight`
    broadcasts to it. See `masked_mse_loss` for dtypes and the results of the reductions.

    Raises:
        ValueError: `reduction` or `backend` is not valid.
    """

    def __init__(self, reduction: str = "mean", backend: str = "auto") -> None:
        super().__init__()
        self.reduction = check_reduction(reduction, MASKED_REDUCTIONS)
        self.backend = check_backend(backend)

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """`masked_mse_loss` of `pred`, `target` and `weight`, with the settings of this module."""
        return masked_mse_loss(pred, target, weight, reduction=self.reduction, backend=self.backend)

    def extra_repr(self) -> str:
        """The settings."""
        return f"reduction={self.reduction!r}, backend={self.backend!r}"


def _shown(weight: Tensor) -> float | str:
    if weight.is_meta:
        return "meta"
    return float(f"{weight.item():.6g}")  # 0.01, not 0.009999999776482582
