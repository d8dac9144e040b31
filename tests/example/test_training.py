"""A run that is cut off and taken up again ends with the same bits; Ctrl-C loses nothing."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from command_line import flags
from PIL import Image

from examples.text_detection.batches import StepSampler
from examples.text_detection.errors import UserError
from examples.text_detection.generator import GeneratedText
from examples.text_detection.log import Log, read_log
from examples.text_detection.processes import Processes
from examples.text_detection.synthtext import write_synthtext
from examples.text_detection.train import Run, main, train
from examples.text_detection.training import Recipe, Training, load_model, read_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = Recipe(pictures=20, held_out=2, size=64, batch=4, steps=8)
CPU = Processes(0, 1, torch.device("cpu"))


def run(out: Path, **changed: object) -> Run:
    quick = Run(out=out, device="cpu", workers=0, score_every=100, log_every=1)
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
    deadline = time.monotonic() + 120
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
    assert {path.name for path in tmp_path.iterdir()} - {"tensorboard"} == files
    log = read_log(tmp_path / "log.csv")
    assert log["step"].tolist() == [1, 2]
    parts = log["coord"] + log["positive_conf"] + log["negative_conf"]
    assert log["loss"] == pytest.approx(parts, rel=1e-4)
    assert (log["negative_weight"] > 0).all()
    assert 0 <= log["f_measure"][-1] <= 1


def test_a_checkpoint_of_another_stride_is_explained() -> None:
    state = Training(SMALL, CPU).state_dict()
    with pytest.raises(
        UserError, match=r"was made with --stride 16, .* run it with --stride 16 to"
    ):
        Training(replace(SMALL, stride=8), CPU).load_state_dict(state)


@pytest.mark.parametrize(
    "contents",
    [None, b"", b"not a checkpoint", {"other": 1}, {"recipe": {}}, {"recipe": 1}, Recipe()],
)
def test_a_file_that_is_no_checkpoint_is_explained(tmp_path: Path, contents: object) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents:
        torch.save(contents, path)
    with pytest.raises(UserError, match=r"there is no checkpoint|is not a checkpoint") as refused:
        read_checkpoint(path)
    assert "weights_only" not in str(refused.value)


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
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    target = torch.rand(4, 7, 4, 4)
    target[:, 6] = (target[:, 6] > 0.7).float()
    full, half = (Training(replace(SMALL, amp=amp), CPU) for amp in (False, True))
    for training in (full, half):
        training.advance(pictures, target)
        assert training.model.head.weight.dtype == torch.float32
    start = Training(SMALL, CPU).model.head.weight.detach()
    ends = [training.model.head.weight.detach() for training in (full, half)]
    changes = [(end - start).flatten() for end in ends]
    assert torch.cosine_similarity(*changes, dim=0) > 0.999
    assert changes[1].norm() == pytest.approx(changes[0].norm().item(), rel=0.01)


def test_every_epoch_is_a_permutation_and_any_step_can_be_the_first() -> None:
    batches = list(StepSampler(10, 4, 0, 5, seed=1))
    seen = [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(20))
    assert max(seen[:10]) < 10
    assert seen[:10] != [key - 10 for key in seen[10:]]
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


def test_a_loss_that_is_nan_ends_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Training.advance

    def advance_and_break(self: Training, *batch: torch.Tensor) -> object:
        if self.step == 4:
            self.model.head.bias.data.fill_(torch.nan)
        return advance(self, *batch)

    monkeypatch.setattr(Training, "advance", advance_and_break)
    with pytest.raises(UserError, match=r"no longer finite at step 5: .* holds an earlier step"):
        train(SMALL, run(tmp_path, save_every=2))
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("spoilt", ["model", "momentum"])
def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    """The loss of the step in which they break is still finite."""
    advance = Training.advance

    def advance_and_break(self: Training, *batch: torch.Tensor) -> object:
        stats = advance(self, *batch)
        if self.step == 3:
            weight = self.model.head.weight
            momentum = self.optimiser.state[weight]["momentum_buffer"]
            (weight.data if spoilt == "model" else momentum)[0, 0] = torch.inf
        return stats

    monkeypatch.setattr(Training, "advance", advance_and_break)
    with pytest.raises(
        UserError, match="no longer finite at step 3: nothing was saved; train anew"
    ):
        train(SMALL, run(tmp_path, save_every=3, log_every=100))
    assert not (tmp_path / "checkpoint.pt").exists()


def fills_up(monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    """From now on, a write to files of that name finds no space left."""
    write = getattr(Path, method)

    def write_or_fail(self: Path, *arguments: object, **options: object) -> object:
        if self.name == name and "r" not in arguments:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, *arguments, **options)

    monkeypatch.setattr(Path, method, write_or_fail)


@pytest.mark.parametrize(
    ("name", "method", "sentence"),
    [
        ("checkpoint.pt.tmp", "write_bytes", "cannot write OUT/checkpoint.pt: No space left"),
        ("log.csv", "open", "OUT/log.csv: No space left"),
    ],
)
def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    method: str,
    sentence: str,
) -> None:
    options = flags(size=64, batch=2, workers=0, held_out=2, device="cpu", out=tmp_path)
    main([*options, *flags(steps=4, save_every=2, log_every=1)])
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    state["recipe"]["steps"] = 6
    torch.save(state, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    fills_up(monkeypatch, name, method)
    with pytest.raises(SystemExit) as stop:
        main([*options, *flags(steps=6, save_every=2, log_every=1, resume=True)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {sentence.replace('OUT', str(tmp_path))} on device"
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not (tmp_path / "checkpoint.pt.tmp").exists()


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run"])
def test_an_out_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(flags(size=64, batch=2, workers=0, steps=1, device="cpu", out=tmp_path / out))
    assert stop.value.code == 2
    assert f"cannot make the folder {tmp_path / out}: " in capsys.readouterr().err


GOOD = "step,loss,f_measure\n1,0.5,\n2,0.25,0.5\n"


@pytest.mark.parametrize(
    ("contents", "steps", "damaged"),
    [
        (GOOD.encode(), [1, 2], 0),
        (GOOD.encode() + b"3,0.1", [1, 2], 1),  # a crash while it was written
        (GOOD.encode() + b"3,0.1,0.2,7\n", [1, 2], 1),
        (GOOD.encode() + b"x,0.1,0.2\n", [1, 2], 1),
        (GOOD.encode() + b"3,x,0.2\n", [1, 2], 1),
        (GOOD.encode() + b"\n", [1, 2], 1),
        (GOOD.encode() + b"\0\0\xff\xfe,\0\n", [1, 2], 1),
        (GOOD.encode() + b'3,"0.1,0.2\n4,0.1,0.2\n', [1, 2, 4], 1),
        (GOOD.encode()[3:], [], 2),
        (b"\x89PNG\r\n\x1a\n\0\0", [], 2),
        (b"", [], 0),
    ],
)
def test_a_damaged_log_loses_only_its_damaged_rows(
    tmp_path: Path, contents: bytes, steps: list[int], damaged: int
) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(contents)
    warned = pytest.warns(UserWarning, match=f"{damaged} damaged rows of .*log.csv are left out")
    with warned if damaged else nullcontext():
        log = Log(path, ("loss", "f_measure"), after=9)
    log.add(10, loss=1.0)
    assert read_log(path)["step"].tolist() == [*steps, 10]
    assert not (tmp_path / "log.csv.tmp").exists()


def test_a_run_goes_on_with_a_damaged_log(tmp_path: Path) -> None:
    train(replace(SMALL, steps=2), run(tmp_path))
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    state["recipe"]["steps"] = 3
    torch.save(state, tmp_path / "checkpoint.pt")
    with (tmp_path / "log.csv").open("a") as file:
        file.write("\0\0\0")
    with pytest.warns(UserWarning, match="1 damaged rows"):
        train(replace(SMALL, steps=3), run(tmp_path, resume=True))
    assert read_log(tmp_path / "log.csv")["step"].tolist() == [1, 2, 3]


def test_tensorboard_gets_what_the_log_gets(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(replace(SMALL, steps=3), run(tmp_path))
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    log = read_log(tmp_path / "log.csv")
    for name in ("loss", "negative_weight", "num_positive"):
        scalars = accumulator.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx(log[name], rel=1e-5)


def test_scores_are_valid_json_also_where_the_recipe_is_infinite(tmp_path: Path) -> None:
    train(replace(SMALL, steps=1, clip=math.inf), run(tmp_path))
    score = json.loads((tmp_path / "score.json").read_text(), parse_constant=pytest.fail)
    assert score["recipe"]["clip"] == "inf"


def test_a_checkpoint_of_another_version_is_explained(tmp_path: Path) -> None:
    state = Training(SMALL, CPU).state_dict()
    del state["recipe"]["crop"]
    torch.save(state, tmp_path / "old.pt")
    assert load_model(tmp_path / "old.pt")[1] == SMALL
    weight = state["model"].pop("head.weight")
    torch.save({**state, "model": {**state["model"], "head.weight": weight[:1]}}, tmp_path / "b.pt")
    with pytest.raises(
        UserError, match=r"another version's network: size mismatch for head\.weight"
    ):
        load_model(tmp_path / "b.pt")
    state["recipe"]["colour"] = "grey"
    torch.save(state, tmp_path / "new.pt")
    with pytest.raises(UserError, match="is of another version: it has colour"):
        load_model(tmp_path / "new.pt")


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("crop", True, False, "made with --crop, this run is without --crop: run it with --crop"),
        ("data", "", "set", "made without --data, this run is with --data set: run it without"),
        ("held_out", 2, None, "made with --held-out 2, this run is without --held-out"),
    ],
)
def test_another_recipe_is_explained(
    name: str, before: object, after: object, message: str
) -> None:
    state = Training(replace(SMALL, **{name: before}), CPU).state_dict()
    with pytest.raises(UserError, match=message):
        Training(replace(SMALL, **{name: after}), CPU).load_state_dict(state)


def write_set(folder: Path, count: int) -> str:
    write_synthtext((GeneratedText(count, 64)[index] for index in range(count)), folder)
    return str(folder)


def test_a_run_does_not_go_on_with_another_number_of_pictures(tmp_path: Path) -> None:
    recipe = replace(SMALL, data=write_set(tmp_path / "set", 8), steps=1)
    train(recipe, run(tmp_path / "run"))
    train(recipe, run(tmp_path / "run", resume=True))
    (tmp_path / "set" / "0" / "000001.png").unlink()
    with (
        pytest.warns(UserWarning, match="1 of the 8 pictures"),
        pytest.raises(UserError, match="began with 8 pictures, now there are 7"),
    ):
        train(recipe, run(tmp_path / "run", resume=True))


def test_a_glance_at_pictures_none_of_which_can_be_read_ends_no_run(tmp_path: Path) -> None:
    recipe = replace(SMALL, data=write_set(tmp_path / "set", 8), held_out=1, steps=2)
    spoilt = tmp_path / "set" / "0" / "000007.png"
    Image.open(spoilt).save(spoilt, "jpeg")
    spoilt.write_bytes(spoilt.read_bytes()[:1000])  # it still tells its size
    with (
        pytest.warns(UserWarning, match="no score at step 1: none of the pictures could be"),
        pytest.raises(UserError, match="none of the pictures could be scored"),
    ):
        train(recipe, run(tmp_path / "run", score_every=1))
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("contents", [None, b"\0", b"step,loss\n"])
def test_a_finished_run_is_scored_again_without_its_log(
    tmp_path: Path, contents: bytes | None
) -> None:
    recipe = replace(SMALL, steps=1)
    train(recipe, run(tmp_path))
    (tmp_path / "log.csv").unlink()
    (tmp_path / "curves.png").unlink()
    if contents:
        (tmp_path / "log.csv").write_bytes(contents)
    assert train(recipe, run(tmp_path, resume=True)) is not None
    assert not (tmp_path / "curves.png").exists()


def test_a_broken_tensorboard_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("tensorboard"))
    with pytest.warns(UserWarning, match="no log for TensorBoard: Descriptors"):
        Log(tmp_path / "log.csv", ("loss",)).add(1, loss=1.0)
    assert read_log(tmp_path / "log.csv")["loss"].tolist() == [1.0]


def test_the_current_folder_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(replace(SMALL, steps=1), run(Path()))
    with pytest.raises(UserError, match="has an earlier run; --resume it or name another --out"):
        train(replace(SMALL, steps=1), run(Path()))


def test_held_out_pictures_none_of_which_can_be_read_are_named_at_the_start(tmp_path: Path) -> None:
    recipe = replace(SMALL, data=write_set(tmp_path / "set", 8), held_out=1)
    (tmp_path / "set" / "0" / "000007.png").write_bytes(b"spoilt")
    with pytest.raises(UserError, match=r"not one of the 1 held-out pictures .*000007\.png"):
        train(recipe, run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_split_is_that_of_all_pictures(tmp_path: Path) -> None:
    """Of 9 and of 10 pictures, 8 are trained on."""
    data = write_set(tmp_path / "set", 10)
    last = tmp_path / "set" / "0" / "000009.png"
    last.rename(tmp_path / "last.png")
    recipe = replace(SMALL, data=data, held_out=None, steps=1)
    with pytest.warns(UserWarning, match="1 of the 10 pictures"):
        train(recipe, run(tmp_path / "run"))
    (tmp_path / "last.png").rename(last)
    with pytest.raises(UserError, match="began with 9 pictures, now there are 10"):
        train(recipe, run(tmp_path / "run", resume=True))


def test_the_checkpoint_is_saved_before_pictures_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.text_detection.train.evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, run(tmp_path, score_every=2, save_every=2))
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def test_scores_come_as_often_as_they_are_asked_for(tmp_path: Path) -> None:
    train(SMALL, run(tmp_path, score_every=3, log_every=2))
    log = read_log(tmp_path / "log.csv")
    assert log["step"].tolist() == [2, 3, 4, 6, 8]
    assert log["step"][~np.isnan(log["f_measure"])].tolist() == [3, 6, 8]
