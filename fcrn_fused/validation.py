"""What the public functions accept; everything else is refused, before anything is launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reductions import DIVISORS

BACKENDS = ("auto", "fused", "reference")
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_UNKNOWN_SUBCLASSES = {
    "DTensor": "pass its to_local(), and add up what the loss is divided by over the ranks",
    "MaskedTensor": "pass its get_data(), and mark what is masked by ignore_value",
}


class Rule(NamedTuple):
    """The settings of the loss, in the one order in which everything below passes them on."""

    negative_weight: float | Tensor  # a number, or a 0-dim tensor
    positive_weight: float
    coord_weight: float | Sequence[float] | Tensor  # one for all pose maps, or one for each
    ignore_value: float | None
    reduction: str


def check(
    pred: Tensor,
    target: Tensor,
    negative_weight: float | Tensor,
    positive_weight: float,
    coord_weight: float | Sequence[float] | Tensor,
    ignore_value: float | None,
    reduction: str,
) -> Rule:
    """Check the arguments of `fcrn_loss` against each other.

    Raises:
        TypeError: `pred` or `target` is not a tensor, or a weight is not a number.
        ValueError: a shape, dtype, device, reduction, weight or `ignore_value` does not fit.
    """
    if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
        name, given = ("target", target) if isinstance(pred, Tensor) else ("pred", pred)
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    for name, tensor in (("pred", pred), ("target", target)):
        if remedy := _UNKNOWN_SUBCLASSES.get(type(tensor).__name__):
            raise ValueError(
                f"{name} must be a plain tensor, got a {type(tensor).__name__}; {remedy}"
            )
    shape = pred.shape
    if shape != target.shape:
        raise ValueError(
            f"target must have the shape of pred, {tuple(shape)}, got {tuple(target.shape)}"
        )
    if len(shape) < 2 or shape[1] < 1:
        raise ValueError(
            "pred must have the shape (B, C, *S), C = pose maps + 1 confidence map, "
            f"got {tuple(shape)}"
        )
    if not (pred.dtype in _FLOATING and target.dtype in _FLOATING):
        name, tensor = ("target", target) if pred.dtype in _FLOATING else ("pred", pred)
        raise ValueError(
            f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}"
        )
    device = pred.device
    if device != target.device:
        raise ValueError(f"target must be on the device of pred, {device}, got {target.device}")
    if not (pred.layout is torch.strided and target.layout is torch.strided):
        name, tensor = ("target", target) if pred.layout is torch.strided else ("pred", pred)
        raise ValueError(f"{name} must be a dense (strided) tensor, got {tensor.layout}")
    if isinstance(negative_weight, Tensor):
        _check_weight_tensor("negative_weight", negative_weight, device, num_maps=None)
    else:
        negative_weight = check_weight("negative_weight", negative_weight)
        if torch.compiler.is_compiling():
            # as a tensor: a number that is annealed would be compiled in, each value anew
            one = torch.ones((), dtype=torch.float64, device=device)
            negative_weight = one * negative_weight
    if isinstance(coord_weight, Tensor):
        _check_weight_tensor("coord_weight", coord_weight, device, shape[1] - 1)
    else:
        coord_weight = check_coord_values(coord_weight, shape[1] - 1)
    return Rule(
        negative_weight,
        check_weight("positive_weight", positive_weight),
        coord_weight,
        None if ignore_value is None else check_ignore_value(ignore_value),
        check_reduction(reduction),
    )


def check_weight(name: str, weight: float) -> float:
    """A weight given as a number: real, finite and not negative.

    Raises:
        TypeError: not a number.
        ValueError: negative, NaN or infinite.
    """
    if not isinstance(weight, float):
        weight = _as_float(name, weight)
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {weight}")
    return weight


def check_ignore_value(ignore_value: float | None) -> float | None:
    """The target confidence of cells to leave out: any number but NaN, or None.

    Raises:
        TypeError: not a number.
        ValueError: NaN, which no target confidence is equal to.
    """
    if ignore_value is None:
        return None
    if not isinstance(ignore_value, float):
        ignore_value = _as_float("ignore_value", ignore_value)
    if ignore_value != ignore_value:
        raise ValueError("ignore_value must not be NaN (nothing is equal to nan), got nan")
    return ignore_value


def check_reduction(reduction: str) -> str:
    """Raises ValueError for anything but the names in `DIVISORS`."""
    names = tuple(DIVISORS)
    if reduction not in names:
        raise ValueError(f"reduction must be one of {', '.join(names)}, got {reduction!r}")
    return reduction


def check_backend(backend: str) -> str:
    """Raises ValueError for anything but the names in `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def check_coord_values(
    coord_weight: float | Sequence[float], num_maps: int | None = None
) -> float | tuple[float, ...]:
    """Weights of the pose maps given as numbers: one for all, or `num_maps` of them.

    `num_maps` None: any number of them.
    """
    if isinstance(coord_weight, (float, int, str, bytes)) or not hasattr(coord_weight, "__len__"):
        return check_weight("coord_weight", coord_weight)  # type: ignore[arg-type]
    if num_maps is not None and len(coord_weight) != num_maps:
        raise ValueError(
            f"coord_weight must be one number or one for each of the {num_maps} pose maps, "
            f"got {len(coord_weight)}"
        )
    return tuple(
        [check_weight(f"coord_weight[{i}]", weight) for i, weight in enumerate(coord_weight)]
    )


def _check_weight_tensor(
    name: str, weight: Tensor, device: torch.device, num_maps: int | None
) -> None:
    """`num_maps` None: only 0-dim will do; else a tensor of shape (num_maps,) does as well."""
    if weight.dtype not in _FLOATING:
        raise ValueError(
            f"{name} must be float64, float32, float16 or bfloat16, got {weight.dtype}"
        )
    if weight.dim() != 0 and (num_maps is None or weight.shape != (num_maps,)):
        wanted = "a 0-dim tensor" if num_maps is None else f"a tensor of shape () or ({num_maps},)"
        raise ValueError(f"{name} must be a number or {wanted}, got shape {tuple(weight.shape)}")
    if weight.device != device and weight.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the device of pred, {device}, or on the CPU, got {weight.device}"
        )
    if weight.requires_grad:
        raise ValueError(
            f"{name} is a constant and must not require grad, got requires_grad=True; detach() it"
        )


def _as_float(name: str, value: object) -> float:
    """A number that is no float: an int, a NumPy scalar, a Fraction."""
    if isinstance(value, (str, bytes, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value}") from None
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from error
