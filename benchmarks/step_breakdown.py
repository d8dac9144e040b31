"""Where the time of a step goes: Python, dispatch, allocation, kernel.

    python benchmarks/step_breakdown.py [--device cuda]

Takes a step (forward and backward of `fcrn_fused.fcrn_loss`) apart by running it with a layer less
each time, all in interleaved rounds, for one small and one large grid:

    node        a step whose operators are replaced by functions that return what is there
                already: Python, FCRNLossFunction and autograd's engine
    dispatch    the operators on a single cell, less their allocations: from Python into C++,
                and the checks of the arguments there
    allocation  the gradient and the loss from PyTorch's allocator, untouched
    kernel      the operators on the whole grid, less those on a single cell
    fresh pages (for comparison, no part of ours) what `zero_()` takes longer in a tensor of the
                gradient's size that is new than in one that has been written before

On a GPU the host goes ahead of the device: the rows above are then times of the host, and the
kernels' own time comes from replaying a CUDA graph. What a sum of medians leaves over is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import provenance
import timing
import workloads
from fcrn_fused import fcrn_loss, ops
from loss_speed import align, format_seconds
from workloads import Case, Inputs

SIZES = {"small": (16, 7, 16, 16), "large": (64, 7, 256, 256)}
OPERATORS = ("forward", "backward", "rescale_")  # functions of fcrn_fused.ops
PARTS = ("node", "dispatch", "allocation", "kernel")


class OperatorCall(NamedTuple):
    """One call of a compiled operator within a step, and what it returned."""

    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any


def breakdown(
    case: Case, device: torch.device, rounds: int, round_seconds: float
) -> dict[str, float]:
    """Median seconds of the whole step, of its parts and of what is left over."""
    inputs = workloads.make_inputs(case, device)
    one_cell = workloads.make_inputs(case._replace(size=(1, case.size[1], 1, 1)), device)
    weight = torch.tensor(workloads.NEGATIVE_WEIGHT, device=device)
    step = make_step(inputs, weight)
    written = torch.empty_like(inputs.pred.detach()).zero_()

    def mse_loss() -> None:
        inputs.pred.grad = None
        F.mse_loss(inputs.pred, inputs.target).backward()

    calls: dict[str, timing.Call] = {
        "step": step,
        "mse_loss": mse_loss,
        "step of nothing": without_operators(step),
        "operators": operators_alone(step),
        "operators, one cell": operators_alone(make_step(one_cell, weight)),
        "allocation": allocation(inputs),
        "allocation, one cell": allocation(one_cell),
        "write fresh": lambda: torch.empty_like(written).zero_(),
        "write again": lambda: written.zero_(),
    }
    seconds = {
        name: timing.quartiles(measured).median
        for name, measured in timing.wall_clock(
            calls, rounds=rounds, round_seconds=round_seconds, threads=case.threads
        ).items()
    }
    parts = {
        "step": seconds["step"],
        "mse_loss": seconds["mse_loss"],
        "node": seconds["step of nothing"],
        "dispatch": seconds["operators, one cell"] - seconds["allocation, one cell"],
        "allocation": seconds["allocation"],
        "kernel": seconds["operators"] - seconds["operators, one cell"],
        "fresh pages": seconds["write fresh"] - seconds["write again"],
    }
    if device.type == "cuda":
        replayed, _ = timing.graph_replays(
            {"step": [step]}, rounds=rounds, round_seconds=round_seconds
        )
        parts["device"] = timing.quartiles(replayed["step"]).median
    parts["left over"] = parts["step"] - sum(parts[name] for name in PARTS)
    return parts


def make_step(inputs: Inputs, weight: Tensor) -> timing.Call:
    """Forward and backward of the fused loss."""

    def step() -> None:
        inputs.pred.grad = None
        fcrn_loss(inputs.pred, inputs.target, negative_weight=weight, backend="fused").backward()

    return step


def operator_calls(step: timing.Call) -> list[OperatorCall]:
    """The calls of compiled operators that a step makes, in their order.

    Raises:
        RuntimeError: it makes none through `fcrn_fused.ops`.
    """
    calls: list[OperatorCall] = []

    def recorder(name: str) -> Callable[..., Any]:
        operator = getattr(ops, name)

        def record(*arguments: Any, **keywords: Any) -> Any:
            result = operator(*arguments, **keywords)
            # a list of its own: the caller takes what it needs out of the other
            kept = list(result) if isinstance(result, list) else result
            calls.append(OperatorCall(name, _detached(arguments), keywords, kept))
            return result

        return record

    with OperatorsReplaced({name: recorder(name) for name in OPERATORS}):
        step()
    if not calls:
        raise RuntimeError("the step calls no operator of fcrn_fused.ops")
    return calls


def operators_alone(step: timing.Call) -> timing.Call:
    """The operators that a step calls, without the step."""
    calls = [
        (getattr(ops, name), arguments, keywords)
        for name, arguments, keywords, _ in operator_calls(step)
    ]

    def operators() -> None:
        for operator, arguments, keywords in calls:
            operator(*arguments, **keywords)

    return operators


def without_operators(step: timing.Call) -> timing.Call:
    """A step in which the operators compute nothing; what they would return exists already."""
    results = {call.name: call.result for call in operator_calls(step)}

    def stub(name: str) -> Callable[..., Any]:
        def existing(*arguments: Any, **keywords: Any) -> Any:
            return _detached(results[name])  # as new to autograd as the operator's own result

        return existing

    stubs = {name: stub(name) for name in results}

    def step_of_nothing() -> None:
        with OperatorsReplaced(stubs):
            step()

    return step_of_nothing


def allocation(inputs: Inputs) -> timing.Call:
    """A gradient and a loss from PyTorch's allocator."""
    pred = inputs.pred.detach()

    def allocate() -> None:
        torch.empty_like(pred)
        torch.empty((), device=pred.device)

    return allocate


class OperatorsReplaced:
    """Functions of `fcrn_fused.ops` replaced for a while, at next to no cost."""

    def __init__(self, replacements: dict[str, Callable[..., Any]]) -> None:
        self.replacements = replacements
        self.originals = {name: getattr(ops, name) for name in replacements}

    def __enter__(self) -> None:
        vars(ops).update(self.replacements)

    def __exit__(self, *exception: object) -> None:
        vars(ops).update(self.originals)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        items = [_detached(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def format_breakdown(name: str, case: Case, parts: dict[str, float]) -> str:
    """A line a part, with its share of the step."""
    lines = [[f"{name} {case.size}", "time", "of the step"]]
    for part, seconds in parts.items():
        amount = "-" if seconds < 0 else format_seconds(seconds)
        lines.append([part, amount, f"{seconds / parts['step']:.0%}"])
    return align(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="step_breakdown.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-seconds", type=float, default=0.1)
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    if options.rounds < 1 or not options.round_seconds > 0:
        parser.error("--rounds must be at least 1 and --round-seconds positive")
    device = torch.device(options.device)
    if why := ops.why_not(device.type):
        parser.error(f"there is nothing to take apart: {why}")

    run = provenance.describe_run(device)
    if warning := provenance.busy_warning():
        print(warning)
    print(f"{provenance.device_name(run['device'])}, PyTorch {torch.__version__}")
    rows = []
    for name, size in SIZES.items():
        pattern = workloads.parse_pattern("clustered:2")
        case = Case(size, pattern, "float32", "contiguous", torch.get_num_threads())
        parts = breakdown(case, device, options.rounds, options.round_seconds)
        print("\n" + format_breakdown(name, case, parts))
        rows.append({"name": name, "case": case.as_json(), "seconds": parts})
    path = options.output or provenance.RESULTS / f"step_breakdown_{device.type}.json"
    provenance.write_json({"benchmark": "step_breakdown", **run, "rows": rows}, path)
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
