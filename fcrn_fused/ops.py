"""The compiled operators: finds them, says why not, and gives them their fake kernels."""

from __future__ import annotations

import functools
import importlib
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import accumulation_dtype
from .validation import REDUCTIONS, Rule
from .version import __version__

MAX_DIMS = 18  # B, C and kMaxSpatialDims of csrc/tensor_view.h; more, where some lie in one
_OLDEST_TORCH = (2, 11)
_REBUILD = "build it again with `pip install --no-build-isolation .`"
_FOLDERS = sys.modules[__package__].__path__

# What setup.py wrote beside the compiled modules; a source folder that was never built has none.
try:
    BUILD_INFO: dict[str, str | None] = importlib.import_module("fcrn_fused._build_info").INFO
except ModuleNotFoundError:
    BUILD_INFO = {}


def why_not(device_type: str, index: int | None = None) -> str | None:
    """Why the compiled kernels do not serve a device ("cpu", "cuda"); None: they do.

    `index` is that of a CUDA device, None the current one; the first question about one begins to
    use it.
    """
    if device_type == "meta":
        device_type = "cpu"  # shapes and dtypes only: the fake kernels serve it
    problem = _problems.get(device_type, f"there are no kernels for {device_type} devices")
    if problem is None and device_type == "cuda":
        return _cuda_device_problem(index)
    return problem


def forward(
    pred: Tensor,
    target: Tensor,
    rule: Rule | tuple[Any, ...],
    want_grad: bool = False,
    want_stats: bool = False,
) -> list[Tensor]:
    """One pass: `[loss[, coord, positive_conf, negative_conf, num_positive][, grad]]`.

    `grad` is dloss/dpred for a grad_output of 1; for "positive", still to be divided by the number
    of positive cells, which is known only at the end of the pass (`rescale_` does it).
    """
    result: list[Tensor] = torch.ops.fcrn_fused.forward.default(
        pred, target, *_op_arguments(pred, *rule), want_grad, want_stats
    )
    return result


def backward(
    grad_output: Tensor,
    pred: Tensor,
    target: Tensor,
    rule: Rule | tuple[Any, ...],
    num_positive: Tensor | None,
    *,
    wrt_target: bool = False,
) -> Tensor:
    """dloss/dpred or dloss/dtarget, computed afresh; `num_positive` is wanted by "positive"."""
    gradient: Tensor = torch.ops.fcrn_fused.backward.default(
        grad_output, pred, target, *_op_arguments(pred, *rule), num_positive, wrt_target
    )
    return gradient


def rescale_(
    grad: Tensor,
    grad_output: Tensor,
    pred: Tensor,
    target: Tensor,
    rule: Rule | tuple[Any, ...],
    num_positive: Tensor | None,
) -> None:
    """Turn the `grad` that `forward` wrote into the gradient for `grad_output`, in place.

    The device decides: nothing is done where grad_output is 1; else what can differ from zero is
    computed afresh, so the result is the same to the bit as that of `backward`.
    """
    torch.ops.fcrn_fused.rescale_.default(
        grad, grad_output, pred, target, *_op_arguments(pred, *rule), num_positive
    )


def _op_arguments(
    pred: Tensor,
    negative_weight: float | Tensor,
    positive_weight: float,
    coord_weight: float | Sequence[float] | Tensor,
    ignore_value: float | None,
    reduction: str,
) -> tuple[Any, ...]:
    """A `Rule` as the operators take it: tensors and numbers apart, the reduction by its place.

    The operators check values; that a number is one is checked here, since they would take a
    tensor of one element for it.
    """
    negative_tensor = coord_tensor = None
    if isinstance(negative_weight, Tensor):
        if negative_weight.requires_grad:
            raise ValueError("negative_weight is a constant and must not require grad")
        negative_tensor, negative_weight = negative_weight, 0.0
    if isinstance(coord_weight, (float, int)):
        coord_weight = (coord_weight,)
    elif isinstance(coord_weight, Tensor):
        if coord_weight.requires_grad:
            raise ValueError("coord_weight is a constant and must not require grad")
        coord_tensor, coord_weight = coord_weight, ()
    else:
        if len(coord_weight) == 1 and pred.shape[1] != 2:  # the operators take one number for all
            raise ValueError("coord_weight must be one number or one for each pose map, got 1")
        if not all(isinstance(weight, (float, int)) for weight in coord_weight):
            raise TypeError("coord_weight must be made of numbers")
    if not isinstance(positive_weight, (float, int)):
        raise TypeError(f"positive_weight must be a number, got {type(positive_weight).__name__}")
    if not (ignore_value is None or isinstance(ignore_value, (float, int))):
        raise TypeError(f"ignore_value must be a number, got {type(ignore_value).__name__}")
    return (
        negative_tensor,
        coord_tensor,
        negative_weight,
        positive_weight,
        coord_weight,
        ignore_value,
        REDUCTIONS.index(reduction),
    )


def _load() -> dict[str, str | None]:
    """Load the compiled modules; by type of device, the problem that keeps its kernels away."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        problem = (
            f"the compiled kernels need PyTorch {'.'.join(map(str, _OLDEST_TORCH))} or newer, "
            f"this is {torch.__version__}; upgrade with `pip install -U torch`"
        )
        return {"cpu": problem, "cuda": problem}
    if (built := BUILD_INFO.get("version", __version__)) != __version__:
        problem = (
            f"the compiled kernels are of fcrn_fused {built}, this is {__version__}; {_REBUILD}"
        )
        return {"cpu": problem, "cuda": problem}
    cpu_problem = _import_problem("cpu", "_C")
    if cpu_problem is None and BUILD_INFO.get("cuda") and not torch.backends.cuda.is_built():
        cuda_problem: str | None = (
            f"this PyTorch, {torch.__version__}, is not a CUDA build; install one (the CUDA "
            "kernels of fcrn_fused are there)"
        )
    else:
        cuda_problem = cpu_problem or _import_problem("cuda", "_cuda")
    return {"cpu": cpu_problem, "cuda": cuda_problem}


def _import_problem(device_type: str, name: str) -> str | None:
    """Import a compiled module, which registers its kernels; None, or why that does not work."""
    try:
        importlib.import_module(f"fcrn_fused.{name}")
        return None
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            return f"fcrn_fused.{name} does not load ({error}); {_REBUILD}"
    if omitted := BUILD_INFO.get(f"{device_type}_problem"):
        kernels = "CUDA kernels" if device_type == "cuda" else "compiled kernels"
        return f"fcrn_fused was built without {kernels}: {omitted}; {_REBUILD}"
    if files := sorted(path.name for folder in _FOLDERS for path in Path(folder).glob(f"{name}.*")):
        here = f"{sys.implementation.name} {platform.python_version()}"
        return f"{files[0]} was compiled for another Python than this {here}; {_REBUILD}"
    return f"{_FOLDERS[0]} was not built; {_REBUILD}"


@functools.cache
def _cuda_device_problem(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return (
            "PyTorch sees no CUDA device (torch.cuda.is_available() is False); look for the GPU "
            "and its driver with nvidia-smi"
        )
    index = torch.cuda.current_device() if index is None else index
    problem: str = importlib.import_module("fcrn_fused._cuda").problem(index)
    if not problem:
        return None
    return (
        f"cuda:{index}, {torch.cuda.get_device_name(index)}, cannot run the kernels ({problem}), "
        f"which were built with CUDA {BUILD_INFO['cuda']} for {BUILD_INFO['architectures']}; "
        f"update the driver, or {_REBUILD} on the machine with this GPU"
    )


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler.
_cuda_device_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_devices(pred: Tensor, target: Tensor, *weights: Tensor | None) -> None:
    """What the kernels check as well; a call with a tensor on "meta" comes to the fake kernel."""
    torch._check(target.device == pred.device, lambda: "target must be on the device of pred")
    for weight in weights:
        torch._check(
            weight is None or weight.device == pred.device or weight.device.type == "cpu",
            lambda: "a weight must be on the device of pred or on the CPU",
        )


def _fake_forward(
    pred: Tensor,
    target: Tensor,
    negative_weight_tensor: Tensor | None,
    coord_weight_tensor: Tensor | None,
    negative_weight: float,
    positive_weight: float,
    coord_weight: list[float],
    ignore_value: float | None,
    reduction: int,
    want_grad: bool,
    want_stats: bool,
) -> list[Tensor]:
    _check_devices(pred, target, negative_weight_tensor, coord_weight_tensor)
    dtype = accumulation_dtype(pred.dtype, target.dtype)
    match REDUCTIONS[reduction]:
        case "none":
            loss = torch.empty_like(pred, dtype=dtype)
        case "cell":
            loss = pred.new_empty((pred.shape[0], *pred.shape[2:]), dtype=dtype)
        case _:
            loss = pred.new_empty((), dtype=dtype)
    result = [loss]
    if want_stats:
        result += [pred.new_empty((), dtype=dtype) for _ in range(3)]
        result += [pred.new_empty((), dtype=torch.int64)]
    if want_grad:
        result += [torch.empty_like(pred)]
    return result


def _fake_backward(
    grad_output: Tensor,
    pred: Tensor,
    target: Tensor,
    negative_weight_tensor: Tensor | None,
    coord_weight_tensor: Tensor | None,
    negative_weight: float,
    positive_weight: float,
    coord_weight: list[float],
    ignore_value: float | None,
    reduction: int,
    num_positive: Tensor | None,
    wrt_target: bool,
) -> Tensor:
    _check_devices(pred, target, negative_weight_tensor, coord_weight_tensor)
    return torch.empty_like(target if wrt_target else pred)


def _fake_rescale_(
    grad: Tensor,
    grad_output: Tensor,
    pred: Tensor,
    target: Tensor,
    negative_weight_tensor: Tensor | None,
    coord_weight_tensor: Tensor | None,
    negative_weight: float,
    positive_weight: float,
    coord_weight: list[float],
    ignore_value: float | None,
    reduction: int,
    num_positive: Tensor | None,
) -> None:
    return None


_problems = _load()
if _problems["cpu"] is None:
    torch.library.register_fake("fcrn_fused::forward", _fake_forward)
    torch.library.register_fake("fcrn_fused::backward", _fake_backward)
    torch.library.register_fake("fcrn_fused::rescale_", _fake_rescale_)
    # Autograd is FCRNLossFunction's; below it the operators go to their kernels directly.
    _library = torch.library.Library("fcrn_fused", "IMPL")
    for _name in ("forward", "backward", "rescale_"):
        _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
