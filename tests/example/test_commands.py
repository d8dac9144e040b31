"""The commands as typed: what they leave behind, and what they say when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import flags
from PIL import Image

from examples.text_detection import detect, evaluate, make_data
from examples.text_detection.generator import GeneratedText
from examples.text_detection.synthtext import SynthText
from examples.text_detection.train import main as train_main

ROOT = Path(__file__).parents[2]
SMALL = {"size": 64, "batch": 2, "workers": 0, "held_out": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train_main(flags(**SMALL, steps=2, out=out))
    return out / "checkpoint.pt"


def refused(command: list[str], capsys: pytest.CaptureFixture[str], main: object) -> str:
    """The one line a refused command prints; no traceback reaches the terminal."""
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return next(line for line in lines if "error:" in line)


def test_make_data_writes_what_train_and_evaluate_read(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "set"
    make_data.main([str(data), *flags(pictures=6, size=64, workers=0)])
    assert len(SynthText(data)) == 6
    train_main(flags(**SMALL, steps=1, data=data, out=tmp_path / "run"))
    (data / "0" / "000003.png").write_bytes(b"spoilt")
    with pytest.warns(UserWarning, match="scene 3 is left out: cannot read"):
        evaluate.main([str(checkpoint), "--data", str(data)])
    assert "F-measure" in capsys.readouterr().out


def test_detect_leaves_boxes_and_a_drawing_for_every_picture_it_can_read(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(GeneratedText(1)[0].picture).save(pictures / "good.png")
    (pictures / "spoilt.jpg").write_bytes(b"no picture")
    (pictures / "notes.txt").write_text("not a picture, and not taken for one")
    out = tmp_path / "found"
    # Any confidence will do: a network of two steps is sure of nothing.
    command = [str(checkpoint), str(pictures), *flags(out=out, threshold=0)]
    assert "1 of 2 pictures could not be read" in refused(command, capsys, detect.main)
    assert {path.name for path in out.iterdir()} == {"good.png.json", "good.png.png"}
    boxes = json.loads((out / "good.png.json").read_text())
    assert boxes
    assert set(boxes[0]) == {"quad", "x", "y", "w", "h", "theta", "score"}
    middle = np.mean(boxes[0]["quad"], axis=0)
    assert middle == pytest.approx([boxes[0]["x"], boxes[0]["y"]], abs=0.02)
    assert Image.open(out / "good.png.png").size == (256, 256)


def test_an_empty_folder_is_no_list_of_pictures(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no picture in" in refused(
        [str(checkpoint), str(tmp_path)], capsys, detect.main
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt", "x.png"], "there is no checkpoint nowhere.pt"),
        (["CHECKPOINT", "nowhere.png"], "there is no file or folder nowhere.png"),
        (["CHECKPOINT", ".", "--threshold", "2"], "--threshold must be between 0 and 1, not 2.0"),
        (["CHECKPOINT", ".", "--scales", "0"], "--scales must be above 0, not 0.0"),
    ],
)
def test_detect_says_what_is_wrong(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = [argument.replace("CHECKPOINT", str(checkpoint)) for argument in arguments]
    assert message in refused(command, capsys, detect.main)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "0 is not at least 1"),
        (["--stride", "12"], "invalid choice: 12"),
        (["--size", "250"], "--size 250 is no multiple of --stride 16"),
        (["--data", "nowhere"], "there is no nowhere/gt.mat"),
        (["--learning-rate", "-1"], "--learning-rate must be above 0"),
        (["--anneal", "0"], "--anneal must be above 0 and at most 1"),
        (["--device", "tpu9"], "--device"),
        (["--resume"], "there is no checkpoint"),
    ],
)
def test_train_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = [*arguments, "--out", str(tmp_path / "run")]
    assert message in refused(command, capsys, train_main)


def test_a_command_without_a_name_lists_them() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "examples.text_detection"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 2
    assert "keras-question" in listed.stdout
