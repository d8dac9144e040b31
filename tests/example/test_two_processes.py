"""Two processes with half the batch each learn what one learns with the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import flags

from examples.text_detection.train import Run, train
from examples.text_detection.training import Recipe, read_checkpoint

ROOT = Path(__file__).parents[2]
# Batch normalisation on the CPU sees a process's own half, so the group norm it is.
# The second step has momentum. After more of them, rounding errors have moved some value over the
# kink of a ReLU, which magnifies them by three orders and more.
RECIPE = Recipe(pictures=40, held_out=1, size=64, batch=8, steps=2, norm="group")


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("reduction", ["mean", "positive"])
@pytest.mark.usefixtures("threads")
def test_two_steps_of_two_processes_are_two_steps_of_one(tmp_path: Path, reduction: str) -> None:
    recipe = replace(RECIPE, reduction=reduction)
    torch.set_num_threads(1)  # as each of the two has it: convolutions round otherwise with more
    train(recipe, Run(out=tmp_path / "one", device="cpu", workers=0))
    one = read_checkpoint(tmp_path / "one" / "checkpoint.pt")

    options = flags(
        pictures=recipe.pictures,
        size=recipe.size,
        batch=recipe.batch,
        steps=recipe.steps,
        norm=recipe.norm,
        reduction=reduction,
        workers=0,
        held_out=1,
        device="cpu",
        out=tmp_path / "two",
    )
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "examples.text_detection.train", *options),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert launched.returncode == 0, launched.stderr
    two = read_checkpoint(tmp_path / "two" / "checkpoint.pt")

    assert two["step"] == one["step"] == 2
    torch.manual_seed(recipe.seed)
    start = recipe.model().state_dict()
    for name, parameter in one["model"].items():
        torch.testing.assert_close(two["model"][name], parameter, rtol=0, atol=1e-6)
    moved = max((one["model"][name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-3  # they did learn
