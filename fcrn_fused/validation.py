"""Checks of what the public functions are given; all of them raise before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reductions import DIVISORS, MASKED_REDUCTIONS

BACKENDS = ("auto", "fused", "reference")
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Known by name: their modules take long to import, and a program without them needs neither.
_UNSUPPORTED_SUBCLASSES = {
    "DTensor": "pass its to_local(), and add up what the loss is divided by over the ranks",
    "MaskedTensor": "pass its get_data(), and its get_mask() as weight",
}


class Rule(NamedTuple):
    """By what the loss is computed, checked, in the order in which it is passed on."""

    negative_weight: float | Tensor  # a number, or a 0-dim tensor
    positive_weight: float
    coord_weight: float | tuple[float, ...] | Tensor  # one for all pose maps, or one for each
    ignore_value: float | None
    reduction: str
    weight: Tensor | None = None  # of each element, broadcast to pred
    positive: Tensor | None = None  # which cells are, broadcast to (B, 1, *S)
    has_kinds: bool = True  # of cells; False: `masked_mse_loss`, whose elements are all alike


def make_rule(
    negative_weight: float | Tensor,
    positive_weight: float,
    coord_weight: float | Sequence[float] | Tensor,
    ignore_value: float | None,
    reduction: str,
    weight: Tensor | None = None,
    positive: Tensor | None = None,
) -> Rule:
    """The arguments of `fcrn_loss` as a `Rule`; numbers of any type become Python floats.

    Raises:
        TypeError: a weight or `ignore_value` is not a number.
        ValueError: a weight, `ignore_value` or `reduction` does not fit.
    """
    return Rule(
        check_negative_weight(negative_weight),
        check_weight("positive_weight", positive_weight),
        check_coord_weight(coord_weight),
        check_ignore_value(ignore_value),
        check_reduction(reduction),
        weight,
        positive,
    )


def make_masked_rule(weight: Tensor | None, reduction: str) -> Rule:
    """The arguments of `masked_mse_loss` as a `Rule`."""
    reduction = check_reduction(reduction, MASKED_REDUCTIONS)
    return Rule(1.0, 1.0, 1.0, None, reduction, weight, None, has_kinds=False)


def check(pred: Tensor, target: Tensor, rule: Rule) -> None:
    """Check `pred` and `target`, and what depends on them.

    Raises:
        TypeError: `pred`, `target`, `weight` or `positive` is not a tensor.
        ValueError: a shape, dtype, layout, device or number of weights does not fit, or a weight
            requires grad.
    """
    _check_maps("pred", pred)
    _check_maps("target", target)
    shape, device = pred.shape, pred.device
    if shape != target.shape:
        raise ValueError(
            f"target must have the shape of pred, {tuple(shape)}, got {tuple(target.shape)}"
        )
    if rule.has_kinds and (len(shape) < 2 or shape[1] < 1):
        raise ValueError(
            "pred must have the shape (B, C, *S), C = pose maps + 1 confidence map, "
            f"got {tuple(shape)}"
        )
    if device != target.device:
        raise ValueError(f"target must be on the device of pred, {device}, got {target.device}")
    if rule.weight is not None:
        _check_given("weight", rule.weight, pred, shape, (torch.bool, *_FLOATING))
    if rule.positive is not None:
        _check_given("positive", rule.positive, pred, (shape[0], 1, *shape[2:]), (torch.bool,))
    negative_weight, coord_weight = rule.negative_weight, rule.coord_weight
    if isinstance(negative_weight, Tensor):
        _check_weight_tensor("negative_weight", negative_weight, device)
    if isinstance(coord_weight, float):
        return
    num_maps = shape[1] - 1
    if isinstance(coord_weight, Tensor):
        _check_weight_tensor("coord_weight", coord_weight, device)
        if coord_weight.dim() != 0 and coord_weight.shape[0] != num_maps:
            raise ValueError(
                f"coord_weight must be a number or a tensor of shape () or ({num_maps},), "
                f"got shape {tuple(coord_weight.shape)}"
            )
    elif len(coord_weight) != num_maps:
        raise ValueError(
            f"coord_weight must be one number or one for each of the {num_maps} pose maps, "
            f"got {len(coord_weight)}"
        )


def check_negative_weight(weight: float | Tensor) -> float | Tensor:
    """A number as `check_weight` takes it, or a 0-dim floating tensor without grad."""
    if not isinstance(weight, Tensor):
        return check_weight("negative_weight", weight)
    if weight.dim() != 0:
        raise ValueError(
            f"negative_weight must be a number or a 0-dim tensor, got shape {tuple(weight.shape)}"
        )
    return _check_weight_tensor("negative_weight", weight)


def check_coord_weight(
    weight: float | Sequence[float] | Tensor,
) -> float | tuple[float, ...] | Tensor:
    """A number, a sequence or array of numbers, or a floating tensor of shape () or (C - 1,)."""
    if isinstance(weight, float):
        return check_weight("coord_weight", weight)
    if isinstance(weight, Tensor):
        if weight.dim() > 1:
            raise ValueError(
                "coord_weight must be a number or a tensor of shape () or (C - 1,), "
                f"got shape {tuple(weight.shape)}"
            )
        return _check_weight_tensor("coord_weight", weight)
    is_sequence = isinstance(weight, Sequence) and not isinstance(weight, (str, bytes))
    if is_sequence or getattr(weight, "ndim", 0) == 1:  # NumPy's arrays are not Sequences
        return tuple([check_weight(f"coord_weight[{i}]", each) for i, each in enumerate(weight)])
    return check_weight("coord_weight", weight)  # type: ignore[arg-type]  # whatever it is


def check_weight(name: str, weight: float) -> float:
    """A number that is finite and not negative.

    Raises:
        TypeError: not a number.
        ValueError: negative, NaN or infinite.
    """
    if type(weight) is not float:  # np.float64 is a subclass
        weight = _as_float(name, weight)
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {weight}")
    return weight


def check_ignore_value(ignore_value: float | None) -> float | None:
    """The target confidence of cells to ignore: any number but NaN, or None.

    Raises:
        TypeError: not a number.
        ValueError: NaN, which no target confidence is equal to.
    """
    if ignore_value is None:
        return None
    if type(ignore_value) is not float:
        ignore_value = _as_float("ignore_value", ignore_value)
    if ignore_value != ignore_value:
        raise ValueError("ignore_value must not be NaN (nothing is equal to nan), got nan")
    return ignore_value


def check_reduction(reduction: str, names: Collection[str] = DIVISORS) -> str:
    """Raises ValueError for anything but `names`."""
    if reduction not in names:
        raise ValueError(f"reduction must be one of {', '.join(names)}, got {reduction!r}")
    return reduction


def check_backend(backend: str) -> str:
    """Raises ValueError for anything but the names in `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _check_maps(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = _FLOATING) -> None:
    """What `pred`, `target`, `weight` and `positive` must be, each for itself."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if remedy := _UNSUPPORTED_SUBCLASSES.get(type(tensor).__name__):
        raise ValueError(f"{name} must be a plain tensor, got a {type(tensor).__name__}; {remedy}")
    _check_dtype(name, tensor, dtypes)
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got {tensor.layout}")


def _check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = _FLOATING) -> None:
    if tensor.dtype not in dtypes:
        *others, last = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}")


def _check_given(
    name: str, given: Tensor, pred: Tensor, shape: Sequence[int], dtypes: tuple[torch.dtype, ...]
) -> None:
    """A tensor that is broadcast to `shape`, by dimensions of 1 alone; a weight may be 0-dim."""
    _check_maps(name, given, dtypes)
    if given.requires_grad:
        raise ValueError(
            f"{name} is a constant and must not require grad, got requires_grad=True; detach() it"
        )
    is_number = name == "weight" and given.dim() == 0
    if given.device != pred.device and not (is_number and given.device.type == "cpu"):
        raise ValueError(f"{name} must be on the device of pred, {pred.device}, got {given.device}")
    if is_number:
        return
    fits = given.dim() == len(shape) and all(
        size in (1, wanted) for size, wanted in zip(given.shape, shape, strict=True)
    )
    if not fits:
        hint = "; unsqueeze() the dimensions that are missing" if given.dim() < len(shape) else ""
        raise ValueError(
            f"{name} must have as many dimensions as pred, each of 1 or of the size in "
            f"{tuple(shape)}, got shape {tuple(given.shape)}{hint}"
        )


def _check_weight_tensor(name: str, weight: Tensor, device: torch.device | None = None) -> Tensor:
    """Any shape; `device` is that of `pred`, where it is known."""
    _check_dtype(name, weight)
    if weight.requires_grad:
        raise ValueError(
            f"{name} is a constant and must not require grad, got requires_grad=True; detach() it"
        )
    if device is not None and weight.device != device and weight.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the device of pred, {device}, or on the CPU, got {weight.device}"
        )
    return weight


def _as_float(name: str, value: Any) -> float:
    """A number of another type than float: an int, a Fraction, a NumPy scalar or 0-d array."""
    is_number = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    if not is_number or isinstance(value, (str, bytes, Tensor)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value}") from None
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from error
