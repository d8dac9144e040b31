"""How fast `masked_mse_loss` is, beside what one would use instead.

    python benchmarks/masked_speed.py [--device cuda] [--quick] [--output FILE.json]

Forward and backward, float32. The contenders:

    ours           fcrn_fused.masked_mse_loss
    mse_loss       F.mse_loss without a weight, which computes less
    mse_loss-weight  F.mse_loss(weight=), the mask as a float tensor
    eager          (weight * (pred - target)**2).sum() / weight.expand_as(pred).sum()
    compile        torch.compile of that

"bytes" is what ours has to move for an element, forward and backward together, by what counts in
sectors of 8 elements (16 on a CPU).
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
from fcrn_fused import masked_mse_loss, ops


class Case(NamedTuple):
    """Maps of one shape and a weight for them."""

    name: str
    shape: tuple[int, ...]
    weight: Callable[[], Tensor]


def _clustered_cells() -> Tensor:
    mask = torch.zeros(64, 1, 128, 128, dtype=torch.bool)
    mask[..., :57, :57] = True  # 19.8 %
    return mask


def _padded_sequence() -> Tensor:
    return (torch.arange(512) < 307).view(1, 512, 1).expand(32, 512, 1).contiguous()  # 60 %


def _visible_joints() -> Tensor:
    return (torch.arange(17) < 8).view(1, 17, 1, 1).expand(64, 17, 1, 1).contiguous()  # 47 %


CASES = (
    Case("a mask of cells, 20 % clustered", (64, 7, 128, 128), _clustered_cells),
    Case("a weight for each element", (64, 7, 128, 128), lambda: torch.rand(64, 7, 128, 128) + 0.1),
    Case("a padded sequence, 60 % count", (32, 512, 64), _padded_sequence),
    Case("joints, 47 % visible", (64, 17, 64, 48), _visible_joints),
)
_Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_hand(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The loss as it is usually written."""
    return (weight * (pred - target) ** 2).sum() / weight.expand_as(pred).sum()


def expected_bytes(pred: Tensor, weight: Tensor, sector: int) -> float:
    """Bytes an element of float32 that our kernels move, the sum of the weights included."""
    counted = (weight != 0).expand_as(pred).reshape(-1)
    counted = counted[: counted.numel() // sector * sector].view(-1, sector).any(1)
    read = 8 * counted.float().mean().item()
    return 4 + read + 2 * weight.numel() * weight.element_size() / pred.numel()


def measure(case: Case, device: torch.device, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Time each contender on one case; one row each."""
    torch.manual_seed(0)
    pred = torch.randn(case.shape, device=device, requires_grad=True)
    target = torch.randn(case.shape, device=device)
    weight = case.weight().to(device)
    factor = weight.float()
    compiled = torch.compile(by_hand, fullgraph=True, dynamic=False)
    losses: dict[str, tuple[_Loss, Tensor]] = {
        "ours": (masked_mse_loss, weight),
        "mse_loss": (lambda pred, target, _: F.mse_loss(pred, target), factor),
        "mse_loss-weight": (lambda p, t, w: F.mse_loss(p, t, weight=w), factor.expand(case.shape)),
        "eager": (by_hand, factor),
        "compile": (compiled, factor),
    }

    def call_of(loss: _Loss, weight: Tensor) -> timing.Call:
        def step() -> None:
            pred.grad = None
            loss(pred, target, weight).backward()  # type: ignore[no-untyped-call]

        return step

    calls = {name: call_of(*each) for name, each in losses.items()}
    threads = torch.get_num_threads()
    taken = timing.wall_clock(calls, rounds=rounds, round_seconds=seconds, threads=threads)
    gradient = pred.numel() * pred.element_size()
    rows = []
    for name, each in taken.items():
        median, low, high = timing.quartiles(each)
        pred.grad = None
        peak = timing.peak_bytes(calls[name], device)
        row = {"case": case.name, "shape": case.shape, "contender": name, "median_s": median}
        row |= {"low_s": low, "high_s": high, "peak_bytes": peak, "gradient_bytes": gradient}
        sector = 8 if device.type == "cuda" else 16
        rows.append(row | {"expected_bytes": expected_bytes(pred, weight, sector)})
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Times in units of ours, in Markdown."""
    names = ["mse_loss", "mse_loss-weight", "eager", "compile"]
    lines = ["| case | ours | bytes | " + " | ".join(names) + " |", "|---" * 7 + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        of = {row["contender"]: row for row in rows if row["case"] == case}
        ours = of["ours"]
        ratios = [f"{of[name]['median_s'] / ours['median_s']:.2f}x" for name in names]
        cells = [case, f"{ours['median_s'] * 1e3:.2f} ms", f"{ours['expected_bytes']:.1f}", *ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="masked_speed.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one case, few rounds")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if why := ops.why_not(device.type):
        parser.error(f"the kernels do not run on {device.type}: {why}")
    keeps_memory = device.type == "cpu" and timing.keep_freed_memory()
    run = provenance.describe_run(device)
    if warning := provenance.busy_warning():
        print(warning)
    rows: list[dict[str, Any]] = []
    for case in CASES[2:3] if options.quick else CASES:
        rows += measure(case, device, *((3, 0.02) if options.quick else (11, 0.1)))
    print(format_table(rows))
    quick = "_quick" if options.quick else ""
    path = options.output or provenance.RESULTS / f"masked_speed_{device.type}{quick}.json"
    record = {"benchmark": "masked_speed", **run, "freed_memory_kept": keeps_memory, "rows": rows}
    provenance.write_json(record, path)
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
