"""A run that is cut off and taken up again ends with the same bits; Ctrl-C loses nothing."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import flags

from examples.text_detection.batches import StepSampler
from examples.text_detection.errors import UserError
from examples.text_detection.log import Log, read_log
from examples.text_detection.processes import Processes
from examples.text_detection.train import Run, train
from examples.text_detection.training import Recipe, Training, read_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = Recipe(pictures=20, size=64, batch=4, steps=8)
CPU = Processes(0, 1, torch.device("cpu"))


def run(out: Path, **changed: object) -> Run:
    quick = Run(out=out, device="cpu", workers=0, held_out=2, score_every=100, log_every=1)
    return replace(quick, **changed)


def cut_off_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C during the given step."""
    advance = Training.advance

    def advance_and_press(self: Training, *batch: torch.Tensor) -> object:
        stats = advance(self, *batch)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return stats

    monkeypatch.setattr(Training, "advance", advance_and_press)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    recipe = replace(SMALL, norm=norm)
    train(recipe, run(tmp_path / "whole"))

    with monkeypatch.context() as patch:
        cut_off_at(5, patch)
        assert train(recipe, run(tmp_path / "parts")) is None
    assert read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 5
    train(recipe, run(tmp_path / "parts", resume=True))

    folders = tmp_path / "whole", tmp_path / "parts"
    whole, parts = (read_checkpoint(folder / "checkpoint.pt") for folder in folders)
    assert whole["step"] == parts["step"] == SMALL.steps
    assert whole["negative_weight"] == parts["negative_weight"]
    assert whole["learning_rate"] == parts["learning_rate"]
    assert torch.equal(whole["random"], parts["random"])
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
    for index, state in whole["optimiser"]["state"].items():
        momentum = parts["optimiser"]["state"][index]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], momentum)
    assert (folders[0] / "log.csv").read_text() == (folders[1] / "log.csv").read_text()


def test_ctrl_c_in_the_terminal_leaves_a_checkpoint_and_no_traceback(tmp_path: Path) -> None:
    """The whole process group gets the signal, loader processes included."""
    options = flags(size=64, batch=2, steps=100_000, workers=2, log_every=1, device="cpu")
    run_folder = tmp_path / "run"
    log = run_folder / "log.csv"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.text_detection.train", *options, *flags(out=run_folder)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert "interrupted" in out
    assert "Traceback" not in errors
    assert process.returncode == 0
    assert read_checkpoint(run_folder / "checkpoint.pt")["step"] >= 3


def test_a_second_run_sets_the_first_aside(tmp_path: Path) -> None:
    recipe = replace(SMALL, steps=1)
    train(recipe, run(tmp_path / "run"))
    train(replace(recipe, seed=1), run(tmp_path / "run"))
    assert read_checkpoint(tmp_path / "run.1" / "checkpoint.pt")["recipe"]["seed"] == 0
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["recipe"]["seed"] == 1


def test_a_run_leaves_figures_a_score_and_a_log(tmp_path: Path) -> None:
    score = train(replace(SMALL, steps=2), run(tmp_path))
    assert score is not None
    assert score.words > 0
    files = {"checkpoint.pt", "log.csv", "detections.png", "curves.png", "score.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    log = read_log(tmp_path / "log.csv")
    assert log["step"].tolist() == [1, 2]
    parts = log["coord"] + log["positive_conf"] + log["negative_conf"]
    assert log["loss"] == pytest.approx(parts, rel=1e-4)
    assert (log["negative_weight"] > 0).all()
    assert 0 <= log["f_measure"][-1] <= 1


def test_a_checkpoint_of_another_stride_is_explained() -> None:
    state = Training(SMALL, CPU).state_dict()
    with pytest.raises(UserError, match=r"was made with --stride 16, .* give --stride 16 to go on"):
        Training(replace(SMALL, stride=8), CPU).load_state_dict(state)


@pytest.mark.parametrize("contents", [None, b"", b"not a checkpoint", {"other": 1}])
def test_a_file_that_is_no_checkpoint_is_explained(tmp_path: Path, contents: object) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents:
        torch.save(contents, path)
    with pytest.raises(UserError, match=r"no checkpoint|cannot read|not a checkpoint"):
        read_checkpoint(path)


def test_the_negative_weight_rises_from_a_hundredth_to_one() -> None:
    training = Training(replace(SMALL, steps=1000, anneal=0.5), CPU)
    assert training.negative_weight.get_last_weight() == pytest.approx(0.01)
    for _ in range(500):
        training.negative_weight.step()
    assert training.negative_weight.get_last_weight() == 1.0


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "positive"])
def test_the_parts_add_up_to_the_loss(reduction: str) -> None:
    training = Training(replace(SMALL, reduction=reduction), CPU)
    pictures = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    target = torch.rand(4, 7, 4, 4)
    target[:, 6] = (target[:, 6] > 0.7).float()
    loss, stats = training._predict_and_lose(pictures, target)
    assert training.parts(stats, 4).loss == pytest.approx(loss.item(), rel=1e-5)


def test_half_precision_learns_the_same_within_its_precision() -> None:
    pictures = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    target = torch.rand(4, 7, 4, 4)
    target[:, 6] = (target[:, 6] > 0.7).float()
    full, half = (Training(replace(SMALL, amp=amp), CPU) for amp in (False, True))
    for training in (full, half):
        training.advance(pictures, target)
        assert training.model.head.weight.dtype == torch.float32
    change = full.model.head.weight - half.model.head.weight
    assert change.abs().max() < 0.05 * full.model.head.weight.abs().max()


def test_every_epoch_is_a_permutation_and_any_step_can_be_the_first() -> None:
    batches = list(StepSampler(10, 4, 0, 5, seed=1))
    seen = [index for batch in batches for index in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert list(StepSampler(10, 4, 3, 5, seed=1)) == batches[3:]


def test_processes_part_the_batch_between_them() -> None:
    whole = list(StepSampler(10, 4, 0, 5))
    first, second = (list(StepSampler(10, 4, 0, 5, rank=rank, count=2)) for rank in (0, 1))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(b) for b in whole]


def test_a_log_drops_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = Log(path, ("loss", "f_measure"))
    for step in (1, 2, 3):
        log.add(step, loss=step / 2)
    Log(path, ("loss", "f_measure"), after=2).add(3, loss=7.0, f_measure=0.5)
    with path.open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["step", "loss", "f_measure"],
        ["1", "0.5", ""],
        ["2", "1", ""],
        ["3", "7", "0.5"],
    ]
