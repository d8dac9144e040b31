"""What the loss is of a real training step: forward, loss, backward and optimiser of an FCRN.

    python benchmarks/train_step.py [--device cuda] [--networks narrow-16 dense]

For each network and grid, a step with each of four losses (as in loss_speed.py); the time of the
loss alone (forward and backward on predictions of that shape and memory format), its share of the
step, and the peak memory of the step. The networks:

    narrow-16   the example's FCRN, narrow, stride 16: what `make train` trains
    narrow-8    the same with stride 8, four times the cells a picture
    paper-16    the paper's widths (much slower; not by default on a CPU)
    dense       three 3 x 3 convolutions of 16 channels at full resolution: a cell a pixel, the
                least network that a loss can follow
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import measure
from fcrn_fused import ops
from inputs import Case, make_inputs
from loss_speed import Loss, align, format_seconds, losses_for

LOSSES = ("mse_loss", "eager", "compile", "ours")


class Setting(NamedTuple):
    """A network and the pictures it is trained on."""

    network: str
    side: int  # of a square picture, pixels
    stride: int

    @property
    def grid(self) -> int:
        """Cells along one side of the grid."""
        return self.side // self.stride


SETTINGS = {
    "narrow-16": [Setting("narrow-16", side, 16) for side in (256, 512)],
    "narrow-8": [Setting("narrow-8", side, 8) for side in (256, 512)],
    "paper-16": [Setting("paper-16", side, 16) for side in (256, 512)],
    "dense": [Setting("dense", side, 1) for side in (16, 32, 64, 128, 256)],
}


class DenseHead(nn.Sequential):
    """Pictures (B, 3, H, W) in [0, 255] to seven maps of the same size."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 7, 3, padding=1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return super().forward(pictures / 127.5 - 1)


def make_network(setting: Setting) -> nn.Module:
    """The network of a setting, freshly initialised."""
    if setting.network == "dense":
        return DenseHead()
    from examples.text_detection.model import FCRN

    width, _, stride = setting.network.partition("-")
    return FCRN(width, int(stride))


def measure_setting(
    setting: Setting, batch: int, device: torch.device, rounds: int, round_seconds: float
) -> list[dict[str, Any]]:
    """Seconds a step and of the loss alone, and the step's peak memory, a row for each loss."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = make_network(setting).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
    pictures = torch.rand(batch, 3, setting.side, setting.side, device=device) * 255
    case = Case((batch, 7, setting.grid, setting.grid))
    inputs = make_inputs(case, device)
    prediction = network(pictures).detach().requires_grad_()

    def step_with(loss: Loss) -> measure.Call:
        def step() -> None:
            optimiser.zero_grad(set_to_none=True)
            loss(network(pictures), inputs.target).backward()  # type: ignore[no-untyped-call]
            optimiser.step()

        return step

    def alone(loss: Loss) -> measure.Call:
        def forward_backward() -> None:
            prediction.grad = None
            loss(prediction, inputs.target).backward()  # type: ignore[no-untyped-call]

        return forward_backward

    losses = losses_for(case, "step", inputs)
    steps = {name: step_with(losses[name]) for name in LOSSES}
    calls = steps | {f"{name} alone": alone(losses[name]) for name in LOSSES}
    for call in calls.values():
        call()  # compiles, and allocates the optimiser's momentum
    timers = {name: measure.host_timer(call, device) for name, call in calls.items()}
    seconds = measure.interleaved(timers, rounds, round_seconds)
    rows = []
    for name in LOSSES:
        optimiser.zero_grad(set_to_none=True)
        step, loss = (measure.quartiles(seconds[each]) for each in (name, f"{name} alone"))
        rows.append(
            {**setting._asdict(), "batch": batch, "grid": setting.grid, "loss": name}
            | {"step_s": step.median, "step_quartiles_s": [step.low, step.high]}
            | {"loss_s": loss.median, "loss_quartiles_s": [loss.low, loss.high]}
            | {"share": loss.median / step.median}
            | {"peak_bytes": measure.allocations(steps[name], device).peak}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Head and a line for each network, grid and loss."""
    lines = [["network", "pictures", "grid", "loss", "step", "loss alone", "share", "peak MB"]]
    for row in rows:
        times = [format_seconds(row[name]) for name in ("step_s", "loss_s")]
        pictures, grid = f"{row['batch']} x {row['side']}^2", f"{row['grid']}^2"
        peak = f"{row['peak_bytes'] / 1e6:.1f}"
        lines.append(
            [row["network"], pictures, grid, row["loss"], *times, f"{row['share']:.2%}", peak]
        )
    return lines


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
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    device = torch.device(options.device)
    path = options.output or measure.RESULTS / f"train_step_{device.type}.json"
    record = {"benchmark": "train_step", **measure.describe_run(device)}
    record |= {"backend": "reference" if ops.why_not(device.type) else "fused", "rows": []}
    print(f"{measure.device_name(record['device'])}, load {record['load_before']}", flush=True)
    batch = options.batch or (4 if device.type == "cpu" else 16)
    default = [name for name in SETTINGS if device.type == "cuda" or name != "paper-16"]
    for network in options.networks or default:
        for setting in SETTINGS[network]:
            rows = measure_setting(setting, batch, device, options.rounds, options.round_seconds)
            record["rows"] += rows
            measure.write_json(record, path)
            for line in table(rows)[1:]:
                print("  ".join(line), flush=True)
    print(f"\n{align(table(record['rows']), 4)}\n\nwritten: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
