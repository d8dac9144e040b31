"""Where the time of a step goes: Python, dispatch, allocation, kernel.

    python benchmarks/step_breakdown.py [--device cuda]

Takes a step (forward and backward of `fcrn_fused.fcrn_loss`) apart by running it with a layer less
each time, all in interleaved rounds, for one small and one large grid:

    checks      the argument checks of fcrn_loss, alone
    node        a step whose two operators are replaced by functions that return what is there
                already, less the checks: Python, FCRNLossFunction and autograd's engine
    dispatch    the operators on a single cell, less their allocations: from Python into C++
    allocation  the gradient and the loss from PyTorch's allocator, untouched
    kernel      the operators on the whole grid, less those on a single cell
    fresh pages (a part of the kernel) what it costs to write a fresh gradient rather than one that
                has been written before

On a GPU the host goes ahead of the device: the rows above are then times of the host, and the
kernels' own time comes from replaying a CUDA graph. What a sum of medians leaves over is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import provenance
import timing
from cases import Case, Inputs
from fcrn_fused import autograd, fcrn_loss, ops
from fcrn_fused.validation import Rule, check
from loss_speed import align, format_seconds

SIZES = {"small": (16, 7, 16, 16), "large": (64, 7, 256, 256)}
PARTS = ("checks", "node", "dispatch", "allocation", "kernel")


def breakdown(
    case: Case, device: torch.device, rounds: int, round_seconds: float
) -> dict[str, float]:
    """Median seconds of the whole step, of its parts and of what is left over."""
    inputs = cases.make_inputs(case, device)
    weight = torch.tensor(cases.NEGATIVE_WEIGHT, device=device)
    rule = Rule(weight, 1.0, (1.0,), None, "mean")
    one_cell = cases.make_inputs(case._replace(size=(1, case.size[1], 1, 1)), device)
    pred = inputs.pred.detach()
    written = torch.empty_like(pred).zero_()

    def step() -> None:
        inputs.pred.grad = None
        fcrn_loss(inputs.pred, inputs.target, negative_weight=weight, backend="fused").backward()

    def mse_loss() -> None:
        inputs.pred.grad = None
        F.mse_loss(inputs.pred, inputs.target).backward()

    def allocate() -> None:
        torch.empty_like(pred)
        torch.empty((), device=device)

    calls: dict[str, timing.Call] = {
        "step": step,
        "mse_loss": mse_loss,
        "stubbed step": _stubbed(inputs, weight, rule),
        "checks": lambda: check(inputs.pred, inputs.target, weight, 1.0, 1.0, None, "mean"),
        "operators": _operators(inputs, rule),
        "operators, one cell": _operators(one_cell, rule),
        "allocation": allocate,
        "write fresh": lambda: torch.empty_like(pred).zero_(),
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
        "checks": seconds["checks"],
        "node": seconds["stubbed step"] - seconds["checks"],
        "dispatch": seconds["operators, one cell"] - _one_cell_allocation(one_cell, case, rounds),
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


def _operators(inputs: Inputs, rule: Rule) -> timing.Call:
    pred, target = inputs.pred.detach(), inputs.target
    one = torch.ones((), device=pred.device)

    def operators() -> None:
        grad = ops.forward(pred, target, rule, want_grad=True)[-1]
        ops.rescale_(grad, one, pred, target, rule, None)

    return operators


def _one_cell_allocation(inputs: Inputs, case: Case, rounds: int) -> float:
    pred = inputs.pred.detach()

    def allocate() -> None:
        torch.empty_like(pred)
        torch.empty((), device=pred.device)

    measured = timing.wall_clock(
        {"allocation": allocate}, rounds=rounds, round_seconds=0.02, threads=case.threads
    )
    return timing.quartiles(measured["allocation"]).median


def _stubbed(inputs: Inputs, weight: Tensor, rule: Rule) -> timing.Call:
    """A step in which the operators compute nothing; what they would return exists already."""
    loss, grad = ops.forward(inputs.pred.detach(), inputs.target, rule, want_grad=True)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return loss.detach(), grad.detach()  # as new to autograd as the operator's own result

    def rescale_(*args: Any) -> None:
        return None

    def step() -> None:
        inputs.pred.grad = None
        fcrn_loss(inputs.pred, inputs.target, negative_weight=weight, backend="fused").backward()

    def stubbed_step() -> None:
        saved = autograd.ops.forward, autograd.ops.rescale_
        autograd.ops.forward, autograd.ops.rescale_ = forward, rescale_  # type: ignore[assignment]
        try:
            step()
        finally:
            autograd.ops.forward, autograd.ops.rescale_ = saved

    return stubbed_step


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
        pattern = cases.parse_pattern("clustered:2")
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
