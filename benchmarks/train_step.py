"""What the loss is of a real training step: forward, loss, backward and optimiser of an FCRN.

    python benchmarks/train_step.py [--device cuda] [--networks narrow-16 dense]

For each network and grid, a step with each of four losses: `F.mse_loss` (no mask, no weight), the
loss in eager PyTorch, the same under torch.compile, and `fcrn_fused.fcrn_loss`; the time of the
loss alone (forward and backward on predictions of that shape and memory format), its share of the
step, and the peak memory of the step. The networks:

    narrow-16   the example's FCRN, narrow, stride 16: what `make train` trains
    narrow-8    the same with stride 8, four times the cells a picture
    paper-16    the paper's widths (much slower; not by default on a CPU)
    dense       three 3 x 3 convolutions of 16 channels at full resolution: a cell a pixel, the
                least network that a loss can follow

Where the loss is a hundredth of the step, no loss can make the step faster; the last lines say at
which grids it is more than that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import provenance
import timing
import workloads
from examples.text_detection.model import FCRN
from fcrn_fused import ops
from loss_speed import LossFunction, align, format_seconds, loss_function, serving_backend
from workloads import Case

LOSSES = ("mse_loss", "eager", "compile", "ours")
NOTICEABLE = 0.01  # of a step


class Setting(NamedTuple):
    """A network and the pictures it is trained on."""

    network: str
    batch: int
    side: int  # of a square picture, pixels
    stride: int

    @property
    def grid(self) -> int:
        """Cells along one side of the grid."""
        return self.side // self.stride


SETTINGS = {
    "narrow-16": [Setting("narrow-16", 16, side, 16) for side in (256, 512)],
    "narrow-8": [Setting("narrow-8", 16, side, 8) for side in (256, 512)],
    "paper-16": [Setting("paper-16", 16, side, 16) for side in (256, 512)],
    "dense": [Setting("dense", 16, side, 1) for side in (16, 32, 64, 128, 256)],
}
DEFAULT_NETWORKS = {"cpu": ["narrow-16", "narrow-8", "dense"], "cuda": list(SETTINGS)}


class DenseHead(nn.Module):
    """Pictures (B, 3, H, W) in [0, 255] to seven maps of the same size."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 7, 3, padding=1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures / 127.5 - 1)


def make_network(setting: Setting) -> nn.Module:
    """The network of a setting, freshly initialised."""
    if setting.network == "dense":
        return DenseHead()
    width, _, stride = setting.network.partition("-")
    return FCRN(width, int(stride))


def measure(
    setting: Setting,
    device: torch.device,
    rounds: int,
    round_seconds: float,
    progress: Callable[[], object],
) -> list[dict[str, Any]]:
    """Seconds a step and of the loss alone, and the step's peak memory, a row for each loss."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = make_network(setting).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
    pictures = torch.rand(setting.batch, 3, setting.side, setting.side, device=device) * 255
    case = Case(
        (setting.batch, 7, setting.grid, setting.grid),
        workloads.parse_pattern("clustered:2"),
        "float32",
        "contiguous",
        torch.get_num_threads(),
    )
    target = workloads.make_inputs(case, device).target
    prediction = network(pictures).detach().requires_grad_()

    def step_with(loss: LossFunction) -> timing.Call:
        def step() -> None:
            optimiser.zero_grad(set_to_none=True)
            loss(network(pictures), target).backward()
            optimiser.step()

        return step

    def alone(loss: LossFunction) -> timing.Call:
        def forward_backward() -> None:
            prediction.grad = None
            loss(prediction, target).backward()

        return forward_backward

    losses = {name: loss_function(name, device) for name in LOSSES}
    calls: dict[tuple[str, str], timing.Call] = {}
    for name, loss in losses.items():
        assert loss is not None
        calls[name, "step"], calls[name, "loss"] = step_with(loss), alone(loss)
    for call in calls.values():
        call()  # compiles, and allocates the optimiser's momentum
    seconds = timing.wall_clock(
        calls,
        rounds=rounds,
        round_seconds=round_seconds,
        threads=case.threads,
        progress=progress,
    )
    memory_format = prediction.is_contiguous()
    rows = []
    for name in LOSSES:
        optimiser.zero_grad(set_to_none=True)
        step, loss_alone = (timing.quartiles(seconds[name, what]) for what in ("step", "loss"))
        rows.append(
            {
                **setting._asdict(),
                "grid": setting.grid,
                "cells": case.cells,
                "predictions": "contiguous" if memory_format else "channels_last",
                "loss": name,
                "step_s": step.median,
                "step_quartiles_s": [step.low, step.high],
                "loss_s": loss_alone.median,
                "loss_quartiles_s": [loss_alone.low, loss_alone.high],
                "share": loss_alone.median / step.median,
                "peak_bytes": timing.peak_bytes(calls[name, "step"], device),
            }
        )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each network, grid and loss."""
    head = ["network", "pictures", "grid", "loss", "step", "of mse_loss's", "loss alone"]
    lines = [[*head, "share", "peak MB"]]
    for row in rows:
        base = next(
            other
            for other in rows
            if other["loss"] == "mse_loss" and _setting(other) == _setting(row)
        )
        lines.append(
            [
                row["network"],
                f"{row['batch']} x {row['side']}^2",
                f"{row['grid']}^2",
                row["loss"],
                format_seconds(row["step_s"]),
                f"{row['step_s'] / base['step_s']:.3f}",
                format_seconds(row["loss_s"]),
                f"{row['share']:.2%}",
                f"{row['peak_bytes'] / 1e6:.1f}",
            ]
        )
    return align(lines)


def conclusions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of each network: at which grids the loss is a hundredth of the step or more."""
    sentences = []
    for network in dict.fromkeys(row["network"] for row in rows):
        for loss, name in (("eager", "the eager loss"), ("ours", "the fused loss")):
            of_it = [row for row in rows if (row["network"], row["loss"]) == (network, loss)]
            above = [row for row in of_it if row["share"] >= NOTICEABLE]
            most = max(of_it, key=lambda row: row["share"])
            if len(above) == len(of_it):
                where = "is 1 % of the step or more at every grid measured"
            elif above:
                sides = ", ".join(str(row["grid"]) for row in above)
                where = f"is 1 % of the step or more at grids of {sides} cells a side"
            else:
                where = "is less than 1 % of the step at every grid measured"
            sentences.append(
                f"{network}: {name} {where} "
                f"(at most {most['share']:.1%}, at {most['grid']} x {most['grid']})"
            )
    return sentences


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in Setting._fields)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train_step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--networks", nargs="+", choices=list(SETTINGS))
    parser.add_argument("--batch", type=int, help="pictures (default: 4 on a CPU, 16 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-seconds", type=float, default=0.2)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the smallest grid of each network, in 2 rounds",
    )
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    if options.rounds < 1 or not options.round_seconds > 0:
        parser.error("--rounds must be at least 1 and --round-seconds positive")
    device = torch.device(options.device)

    run = provenance.describe_run(device)
    if warning := provenance.busy_warning():
        print(warning)
    backend = serving_backend(device, "auto")
    print(f"{provenance.device_name(run['device'])}, PyTorch {torch.__version__}, ours: {backend}")
    if backend == "reference":
        print(f"ours is not the compiled loss here: {ops.why_not(device.type)}")
    batch = options.batch or (4 if device.type == "cpu" else 16)
    settings = [
        setting._replace(batch=batch)
        for network in options.networks or DEFAULT_NETWORKS[device.type]
        for setting in SETTINGS[network][: 1 if options.quick else None]
    ]
    if options.quick:
        options.rounds = min(options.rounds, 2)
    rows = []
    total = len(settings) * options.rounds * 2 * len(LOSSES)
    with tqdm(total=total, unit="round", leave=False, disable=None) as bar:
        for setting in settings:
            bar.set_description(f"{setting.network}, {setting.grid} x {setting.grid} cells")
            rows += measure(setting, device, options.rounds, options.round_seconds, bar.update)
    print(format_table(rows) + "\n")
    sentences = conclusions(rows)
    print("\n".join(sentences))
    quick = "_quick" if options.quick else ""
    path = options.output or provenance.RESULTS / f"train_step_{device.type}{quick}.json"
    provenance.write_json(
        {
            "benchmark": "train_step",
            **run,
            "backend": backend,
            "conclusions": sentences,
            "rows": rows,
        },
        path,
    )
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
