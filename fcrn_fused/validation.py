"""Argument checks of the public functions. All of them raise before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reductions import DIVISORS, MASKED_REDUCTIONS

BACKENDS = ("auto", "fused", "reference")
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Compared by name, because importing their modules takes long.
_UNSUPPORTED_SUBCLASSES = {
    "DTensor": "pass to_local(), and sum the divisor of the loss over the ranks",
    "MaskedTensor": "pass get_data(), and get_mask() as weight",
}


class Rule(NamedTuple):
    """The settings of a loss, in the order in which `FCRNLossFunction` takes them."""

    negative_weight: float | Tensor  # a number or a 0-dim tensor
    positive_weight: float
    coord_weight: float | Sequence[float] | Tensor  # one for all pose maps, or one for each
    ignore_value: float | None
    reduction: str
    weight: Tensor | None = None  # broadcasts to pred
    positive: Tensor | None = None  # which cells are positive, broadcasts to (B, 1, *S)
    has_kinds: bool = True  # False for `masked_mse_loss`, which has no kinds of cells


def checked(rule: Rule) -> Rule:
    """The rule with numbers of any type as Python floats; `check` checks its tensors.

    Raises:
        TypeError: a weight or `ignore_value` is not a number.
        ValueError: a weight, `ignore_value` or `reduction` is not valid.
    """
    return Rule(
        check_negative_weight(rule.negative_weight),
        check_weight("positive_weight", rule.positive_weight),
        check_coord_weight(rule.coord_weight),
        check_ignore_value(rule.ignore_value),
        check_reduction(rule.reduction),
        *rule[5:],
    )


def make_masked_rule(weight: Tensor | None, reduction: str) -> Rule:
    """The arguments of `masked_mse_loss` as a `Rule`."""
    reduction = check_reduction(reduction, MASKED_REDUCTIONS)
    return Rule(1.0, 1.0, 1.0, None, reduction, weight, None, has_kinds=False)


def check(pred: Tensor, target: Tensor, rule: Rule) -> None:
    """Check `pred` and `target`, and the tensors and number of weights of `rule` against them.

    Raises:
        TypeError: `pred`, `target`, `weight` or `positive` is not a tensor.
        ValueError: a shape, dtype, layout, device or number of weights does not match, or a weight
            requires grad.
    """
    _check_tensor("pred", pred)
    _check_tensor("target", target)
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
        _check_broadcast("weight", rule.weight, pred, shape, (torch.bool, *_FLOATING))
    if rule.positive is not None:
        _check_broadcast("positive", rule.positive, pred, (shape[0], 1, *shape[2:]), (torch.bool,))
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
    """A finite number >= 0, or a 0-dim floating-point tensor that does not require grad."""
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
    """A number, a sequence or array of numbers, or a floating-point tensor, () or (C - 1,)."""
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
    """A finite number that is not negative, as a float.

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
    """Any number except NaN, as a float, or None.

    Raises:
        TypeError: not a number.
        ValueError: NaN.
    """
    if ignore_value is None:
        return None
    if type(ignore_value) is not float:
        ignore_value = _as_float("ignore_value", ignore_value)
    if ignore_value != ignore_value:
        raise ValueError("ignore_value must not be NaN (no confidence equals NaN), got nan")
    return ignore_value


def check_reduction(reduction: str, names: Collection[str] = DIVISORS) -> str:
    """Raises ValueError unless `reduction` is one of `names`."""
    if reduction not in names:
        raise ValueError(f"reduction must be one of {', '.join(names)}, got {reduction!r}")
    return reduction


def check_backend(backend: str) -> str:
    """Raises ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = _FLOATING) -> None:
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


def _check_broadcast(
    name: str, tensor: Tensor, pred: Tensor, shape: Sequence[int], dtypes: tuple[torch.dtype, ...]
) -> None:
    """A constant with the dimensions of `shape`, each of that size or 1; a weight may be 0-dim."""
    _check_tensor(name, tensor, dtypes)
    is_number = name == "weight" and tensor.dim() == 0
    _check_constant(name, tensor, pred.device, may_be_on_cpu=is_number)
    fits = tensor.dim() == len(shape) and all(
        size in (1, wanted) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not (fits or is_number):
        hint = "; unsqueeze() the dimensions that are missing" if tensor.dim() < len(shape) else ""
        raise ValueError(
            f"{name} must have as many dimensions as pred, each of size 1 or as in "
            f"{tuple(shape)}, got shape {tuple(tensor.shape)}{hint}"
        )


def _check_weight_tensor(name: str, weight: Tensor, device: torch.device | None = None) -> Tensor:
    _check_dtype(name, weight)
    _check_constant(name, weight, device)
    return weight


def _check_constant(
    name: str, tensor: Tensor, device: torch.device | None = None, *, may_be_on_cpu: bool = True
) -> None:
    """`device` is that of `pred`, or None while it is not known."""
    if tensor.requires_grad:
        raise ValueError(
            f"{name} is a constant and must not require grad, got requires_grad=True; detach() it"
        )
    if device in (None, tensor.device) or (may_be_on_cpu and tensor.device.type == "cpu"):
        return
    wanted = f"on the device of pred, {device}{', or on the CPU' if may_be_on_cpu else ''}"
    raise ValueError(f"{name} must be {wanted}, got {tensor.device}")


def _as_float(name: str, value: Any) -> float:
    """Convert an int, a Fraction, a NumPy scalar, a 0-d array or another number."""
    is_number = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    if not is_number or isinstance(value, (str, bytes, Tensor)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value}") from None
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from error
