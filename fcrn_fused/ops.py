"""The operators: loads the compiled ones and defines those that allocate their results.

The compiled operators write into tensors that they are given: `fcrn_fused::forward_into` and
`fcrn_fused::backward_into` are one pass over the maps each, `fcrn_fused::sum_into` is one over a
weight. `fcrn_fused::forward` and `fcrn_fused::backward`, defined here, allocate their results and
can be traced and differentiated; compiled, exported and traced programs contain them. In eager
mode, `autograd.FCRNLossFunction` calls `run_forward` and `run_backward`, which do the same without
these two operators' trip through the dispatcher.
"""

from __future__ import annotations

import functools
import importlib
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reductions import COUNT_POSITIVE, DIVISORS, OUTPUTS
from .reference import accumulation_dtype, weight_sum, weight_total
from .tracing import is_traced
from .validation import Rule
from .version import __version__

MAX_DIMS = 18  # B, C and kMaxSpatialDims (csrc/tensor_view.h), not counting merged dimensions
_MOST_NUMBERS = 32  # kInlineCoordWeights of csrc/loss_pass.h
_OLDEST_TORCH = (2, 11)
_REBUILD = "rebuild it with `pip install --no-build-isolation .`"
_FOLDERS = sys.modules[__package__].__path__

# Written by setup.py beside the compiled modules; absent if the package was never built.
try:
    BUILD_INFO: dict[str, str | None] = importlib.import_module("fcrn_fused._build_info").INFO
except ModuleNotFoundError:
    BUILD_INFO = {}


def why_not(device_type: str, index: int | None = None) -> str | None:
    """Why the compiled kernels do not support a type of device ("cpu", "cuda"), or None.

    `index` is that of a CUDA device, None the current one. The first call for a CUDA device
    initialises it.
    """
    if device_type == "meta":
        device_type = "cpu"  # the fake kernels support it
    problem = _problems.get(device_type, f"there are no kernels for {device_type} devices")
    if problem is None and device_type == "cuda":
        return _cuda_device_problem(index)
    return problem


# ---- one pass ------------------------------------------------------------------------------------

# The loss, its parts by kind (3,) and the number of positive cells; None where not wanted.
Results = tuple[Tensor, Tensor | None, Tensor | None]


def op_arguments(pred: Tensor, rule: Rule) -> tuple[Any, ...]:
    """The operators' arguments for a `Rule`.

    `(negative_weight, coord_weight, weight, positive, weight_sum, numbers, ignore_value, divisor,
    output)`: first the tensors, then numbers, the reduction as a divisor and the kind of output.
    """
    negative, positive_weight, coord, ignore_value, reduction, weight, positive, has_kinds = rule
    negative_tensor = coord_tensor = None
    if isinstance(negative, Tensor):
        negative_tensor, negative = negative, 0.0
    if isinstance(coord, (float, int)):
        coord = (coord,)
    elif isinstance(coord, Tensor) or len(coord) > _MOST_NUMBERS:
        if not isinstance(coord, Tensor):
            coord = torch.tensor(coord, dtype=torch.float64, device=pred.device)
        coord_tensor, coord = coord, (0.0,)
    numbers = [negative, positive_weight, *coord] if has_kinds else []
    total = weight_sum(pred, rule, _weight_total)
    divisor = DIVISORS[reduction](pred) if total is None else 1
    tensors = (negative_tensor, coord_tensor, weight, positive, total)
    return *tensors, numbers, ignore_value, divisor, OUTPUTS.get(reduction, 0)


def _weight_total(weight: Tensor, repeats: int) -> Tensor:
    """`reference.weight_total` in one read of the weights, without a copy of them."""
    if is_traced() or weight.is_meta or (weight.is_cuda and weight.dtype is torch.float64):
        return weight_total(weight, repeats)
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.movedim(1, -1)
    total = weight.new_empty((), dtype=torch.float64)
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.fcrn_fused.sum_into.default(
            weight.contiguous(), repeats, total, _workspace(weight)
        )
    return total


def without_cpu_weights(pred: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with tensors on the CPU read and passed by value.

    A CUDA graph thus keeps the values that it was captured with.
    """
    negative: Tensor | None
    coord: Tensor | None
    negative, coord, weight, positive, total, numbers, *rest = arguments
    if negative is not None and negative.is_cpu:
        numbers = [negative.item(), *numbers[1:]]
        negative = None
    if coord is not None and coord.is_cpu:
        if coord.numel() > _MOST_NUMBERS:  # too many to pass by value
            coord = coord.to(pred.device)
        else:
            numbers = [*numbers[:2], *coord.reshape(-1).tolist()]
            coord = None
    if not pred.is_cpu:
        weight, total = (
            torch.full((), given.item(), dtype=given.dtype, device=pred.device)
            if given is not None and given.is_cpu
            else given
            for given in (weight, total)
        )
    return negative, coord, weight, positive, total, numbers, *rest


def _expanded(pred: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with `weight` expanded to pred's shape and `positive` to (B, *S)."""
    negative, coord, weight, positive, *rest = arguments
    if weight is not None:
        weight = weight.expand(pred.shape)
    if positive is not None:
        positive = positive.expand(pred.shape[0], 1, *pred.shape[2:]).squeeze(1)
    return negative, coord, weight, positive, *rest


def rule_of(arguments: tuple[Any, ...], reduction: str) -> Rule:
    """The `Rule` of the operators' arguments, the inverse of `op_arguments`."""
    negative_tensor, coord_tensor, weight, positive, _, numbers, ignore_value, *_ = arguments
    negative, positive_weight, *coord = numbers or (1.0, 1.0, 1.0)
    return Rule(
        negative if negative_tensor is None else negative_tensor,
        positive_weight,
        (coord[0] if len(coord) == 1 else tuple(coord)) if coord_tensor is None else coord_tensor,
        ignore_value,
        reduction,
        weight,
        positive,
        bool(numbers),
    )


def run_forward(
    pred: Tensor,
    target: Tensor,
    arguments: tuple[Any, ...],
    want_stats: bool,
    grad: Tensor | None = None,
) -> Results:
    """The loss and, if wanted, its parts; dloss/dpred at grad_output 1 into `grad`, if given.

    With `COUNT_POSITIVE`, `grad` is not yet divided by the number of positive cells, which is known
    only at the end of the pass; `run_backward` with `rescaled` divides it. `arguments` must come
    from `without_cpu_weights`.
    """
    results = _empty_results(pred, target, arguments, want_stats)
    with torch._C._AutoDispatchBelowAutograd():  # the caller differentiates
        torch.ops.fcrn_fused.forward_into.default(
            pred, target, *_expanded(pred, arguments), *results, grad, _workspace(pred)
        )
    return results


def _empty_results(
    pred: Tensor, target: Tensor, arguments: tuple[Any, ...], want_stats: bool
) -> Results:
    *_, divisor, output = arguments
    dtype = accumulation_dtype(pred.dtype, target.dtype)
    match output:
        case 0:
            loss = pred.new_empty((), dtype=dtype)
        case 1:
            loss = pred.new_empty((pred.shape[0], *pred.shape[2:]), dtype=dtype)
        case _:
            loss = torch.empty_like(pred, dtype=dtype)
    parts = num_positive = None
    if want_stats:
        parts = pred.new_empty((3,), dtype=dtype)
    if want_stats or divisor == COUNT_POSITIVE:
        num_positive = pred.new_empty((), dtype=torch.int64)
    return loss, parts, num_positive


def run_backward(
    grad_output: Tensor,
    pred: Tensor,
    target: Tensor,
    arguments: tuple[Any, ...],
    num_positive: Tensor | None,
    *,
    wrt_target: bool = False,
    rescaled: Tensor | None = None,
) -> Tensor:
    """dloss/dpred or dloss/dtarget.

    `rescaled`, if given, is the `grad` of `run_forward`, which is corrected in place: the device
    reads grad_output, does nothing if it is 1, and else recomputes all that is not masked, so the
    bits are those of a new gradient. `arguments` must come from `without_cpu_weights`.
    """
    if wrt_target and pred.dtype != target.dtype:
        # The kernels write gradients in pred's dtype. Widening is exact, and the gradient is still
        # rounded once; the ignored confidence must be rounded to target's dtype here.
        *weights, ignore_value, divisor, output = arguments
        if ignore_value is not None:
            ignore_value = torch.tensor(ignore_value, dtype=torch.float64).to(target.dtype).item()
        arguments = (*weights, ignore_value, divisor, output)
        dtype, wide = target.dtype, accumulation_dtype(pred.dtype, target.dtype)
        pred, target = pred.to(wide), target.to(wide)
        grad = run_backward(grad_output, pred, target, arguments, num_positive, wrt_target=True)
        return grad.to(dtype)
    grad = torch.empty_like(target if wrt_target else pred) if rescaled is None else rescaled
    settings = (*_expanded(pred, arguments), num_positive, wrt_target, rescaled is not None)
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.fcrn_fused.backward_into.default(grad_output, pred, target, *settings, grad)
    return grad


def _workspace(pred: Tensor) -> Tensor | None:
    """Memory for the sums of the blocks of a launch, 32 bytes each, and 32 bytes for its ticket."""
    if not pred.is_cuda:
        return None
    return pred.new_empty((_most_blocks(pred.device) + 1, 4), dtype=torch.int64)


@functools.cache
def _most_blocks(device: torch.device) -> int:
    per_multiprocessor: int = importlib.import_module("fcrn_fused._cuda").blocks_per_multiprocessor
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


# ---- traced and differentiable ------------------------------------------------------------------


def forward(pred: Tensor, target: Tensor, arguments: tuple[Any, ...]) -> Results:
    """The loss, its parts and the number of positive cells, by the traceable operator."""
    *settings, divisor, output = arguments
    if isinstance(divisor, Tensor) and output == 0:
        # torch.jit.trace gives sizes as tensors, which the operator would make constants. Divide
        # by them here; the number of maps, by which "cell" divides, may be a constant.
        loss, parts, num_positive = forward(pred, target, (*settings, 1, output))
        return loss / divisor, parts, num_positive
    result: Results = torch.ops.fcrn_fused.forward.default(pred, target, *arguments)
    return result


def backward(
    grad_output: Tensor,
    pred: Tensor,
    target: Tensor,
    arguments: tuple[Any, ...],
    num_positive: Tensor | None,
    wrt_target: bool,
) -> Tensor:
    """dloss/dpred or dloss/dtarget, by the traceable operator."""
    result: Tensor = torch.ops.fcrn_fused.backward.default(
        grad_output, pred, target, *arguments, num_positive, wrt_target
    )
    return result


def _forward_kernel(pred: Tensor, target: Tensor, *arguments: Any) -> Results:
    return run_forward(pred, target, without_cpu_weights(pred, arguments), want_stats=True)


def _backward_kernel(grad_output: Tensor, pred: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    *rule, num_positive, wrt_target = arguments
    settings = without_cpu_weights(pred, tuple(rule))
    return run_backward(
        grad_output.contiguous(), pred, target, settings, num_positive, wrt_target=wrt_target
    )


def _check_devices(pred: Tensor, target: Tensor, *arguments: Any) -> None:
    torch._check(target.device == pred.device, lambda: "target must be on the device of pred")
    for given in arguments:
        torch._check(
            not isinstance(given, Tensor) or given.device in (pred.device, torch.device("cpu")),
            lambda: "a weight must be on the device of pred or on the CPU",
        )


def _fake_forward(pred: Tensor, target: Tensor, *arguments: Any) -> Results:
    _check_devices(pred, target, *arguments)
    return _empty_results(pred, target, arguments, want_stats=True)


def _fake_backward(grad_output: Tensor, pred: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    _check_devices(pred, target, *arguments)
    return torch.empty_like(target if arguments[-1] else pred)


def save_for_backward(
    ctx: Any, pred: Tensor, target: Tensor, arguments: tuple[Any, ...], num_positive: Tensor | None
) -> None:
    """Save for backward: tensors by autograd, since compiled autograd loses those kept on ctx."""
    # A schedule may change negative_weight or coord_weight in place before backward.
    copies = [None if given is None else given.clone() for given in arguments[:2]]
    ctx.save_for_backward(pred, target, *copies, *arguments[2:5], num_positive)
    ctx.settings = arguments[5:]
    ctx.set_materialize_grads(False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pred, target, *arguments = inputs
    save_for_backward(ctx, pred, target, tuple(arguments), output[2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_forward(
    ctx: Any, grad_output: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    pred, target, *tensors, num_positive = ctx.saved_tensors
    arguments = (*tensors, *ctx.settings)
    grads = [
        backward(grad_output, pred, target, arguments, num_positive, i == 1)
        if grad_output is not None and ctx.needs_input_grad[i]
        else None
        for i in (0, 1)
    ]
    return (*grads, *(None,) * len(arguments))


def _refuse_to_be_constant(operator: Any, *arguments: Any) -> None:
    """Autograd kernel of the operators that write into tensors, which have no gradient."""
    given = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        raise RuntimeError(
            f"{operator} cannot be differentiated; call fcrn_fused.fcrn_loss or "
            "torch.ops.fcrn_fused.forward, or call it under torch.no_grad()"
        )
    with torch._C._AutoDispatchBelowAutograd():
        operator(*arguments)


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("second derivatives of fcrn_loss are supported in eager mode only")


def _batch_backward(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
    """vmap over grad_output and any other batched input, one example after the other."""

    def example(index: int) -> tuple[Any, ...]:
        return tuple(
            given.select(dim, index) if isinstance(dim, int) else given
            for given, dim in zip(inputs, in_dims, strict=True)
        )

    grads = [torch.ops.fcrn_fused.backward.default(*example(i)) for i in range(info.batch_size)]
    return torch.stack(grads), 0


def _register() -> None:
    rule = (
        "Tensor? negative_weight, Tensor? coord_weight, Tensor? weight, Tensor? positive, "
        "Tensor? weight_sum, float[] numbers, float? ignore_value, SymInt divisor, int output"
    )
    _library.define(f"forward(Tensor pred, Tensor target, {rule}) -> (Tensor, Tensor, Tensor)")
    _library.define(
        f"backward(Tensor grad_output, Tensor pred, Tensor target, {rule}, Tensor? num_positive, "
        "bool wrt_target) -> Tensor"
    )
    for device in ("CPU", "CUDA"):
        _library.impl("forward", _forward_kernel, device)
        _library.impl("backward", _backward_kernel, device)
    for name in ("forward_into", "backward_into", "sum_into"):
        operator = getattr(torch.ops.fcrn_fused, name).default
        _library.impl(name, functools.partial(_refuse_to_be_constant, operator), "Autograd")
        torch.library.register_fake(f"fcrn_fused::{name}", lambda *arguments: None)
    torch.library.register_fake("fcrn_fused::forward", _fake_forward)
    torch.library.register_fake("fcrn_fused::backward", _fake_backward)
    torch.library.register_autograd(
        "fcrn_fused::forward", _differentiate_forward, setup_context=_setup_context
    )
    torch.library.register_autograd("fcrn_fused::backward", _no_second_derivative)
    torch.library.register_vmap("fcrn_fused::backward", _batch_backward)


def _load() -> dict[str, str | None]:
    """Load the compiled modules. For each type of device, why its kernels are missing, or None."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    built = BUILD_INFO.get("version", __version__)
    if version < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        problem: str | None = (
            f"the compiled kernels need PyTorch {oldest} or newer, this is {torch.__version__}; "
            "upgrade with `pip install -U torch`"
        )
    elif built != __version__:
        problem = (
            f"the compiled kernels belong to fcrn_fused {built}, this is {__version__}; {_REBUILD}"
        )
    else:
        problem = _import_problem("cpu", "_C")
    if problem is not None:
        return {"cpu": problem, "cuda": problem}
    if BUILD_INFO.get("cuda") and not torch.backends.cuda.is_built():
        problem = (
            f"this PyTorch, {torch.__version__}, is not a CUDA build; install one (fcrn_fused "
            "has its CUDA kernels)"
        )
    else:
        problem = _import_problem("cuda", "_cuda")
    return {"cpu": None, "cuda": problem}


def _import_problem(device_type: str, name: str) -> str | None:
    """Import a compiled module, which registers its kernels. Why that fails, or None."""
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


_usable_cuda_devices: set[int] = set()  # failures are not kept: they may be temporary


def _cuda_device_problem(index: int | None) -> str | None:
    if index in _usable_cuda_devices:
        return None
    if not torch.cuda.is_available():
        return (
            "PyTorch finds no CUDA device (torch.cuda.is_available() is False); check the GPU "
            "and its driver with nvidia-smi"
        )
    index = torch.cuda.current_device() if index is None else index
    problem: str = importlib.import_module("fcrn_fused._cuda").problem(index)
    if not problem:
        _usable_cuda_devices.add(index)
        return None
    return (
        f"cuda:{index}, {torch.cuda.get_device_name(index)}, cannot run the kernels ({problem}), "
        f"which were built with CUDA {BUILD_INFO['cuda']} for {BUILD_INFO['architectures']}; "
        f"update the driver, or {_REBUILD} on the machine with this GPU"
    )


# torch.compiler.assume_constant_result sets this too, but imports the whole compiler.
_cuda_device_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


_problems = _load()
_library = torch.library.Library("fcrn_fused", "FRAGMENT")
if _problems["cpu"] is None:
    _register()
