"""The commands as typed: what they leave behind, and what they say when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import flags
from icdar_files import write_icdar
from PIL import Image

from examples.text_detection import detect, evaluate, make_data
from examples.text_detection.generator import GeneratedText
from examples.text_detection.grid import Grid
from examples.text_detection.labelled import LabelledPictures
from examples.text_detection.model import FCRN
from examples.text_detection.scene import ILLEGIBLE, Scene
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
    assert len(LabelledPictures(data)) == 6
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
    sure = with_bias(checkpoint, tmp_path / "sure.pt", 0, 0, 0.1, 0.1, 1, 0, 1)
    command = [sure, str(pictures), *flags(out=out)]
    assert "1 of 2 pictures were skipped" in refused(command, capsys, detect.main)
    assert {path.name for path in out.iterdir()} == {"good.png.json", "good.png.png"}
    boxes = json.loads((out / "good.png.json").read_text())
    assert boxes
    assert set(boxes[0]) == {"quad", "x", "y", "w", "h", "theta", "score"}
    middle = np.mean(boxes[0]["quad"], axis=0)
    assert middle == pytest.approx([boxes[0]["x"], boxes[0]["y"]], abs=0.02)
    assert Image.open(out / "good.png.png").size == (256, 256)


def test_detect_replaces_its_own_drawings_and_no_other_picture(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = tmp_path / "a.png", tmp_path / "found"
    Image.new("L", (64, 64)).save(picture)
    command = [str(checkpoint), str(picture), *flags(out=out, device="cpu")]
    detect.main(command)
    detect.main(command)
    picture.replace(out / "a.png.png")
    Image.new("L", (64, 64)).save(picture)
    before = (out / "a.png.png").read_bytes()
    assert "a.png.png exists and is not from `detect`" in refused(command, capsys, detect.main)
    assert (out / "a.png.png").read_bytes() == before


def test_detect_writes_over_no_labels(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ann").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "ann" / "a.png.json").write_text("labels")
    command = [str(checkpoint), str(tmp_path / "a.png"), *flags(out=tmp_path / "ann")]
    assert "a.png.json exists and is not from `detect`" in refused(command, capsys, detect.main)
    assert (tmp_path / "ann" / "a.png.json").read_text() == "labels"


def with_bias(checkpoint: Path, path: Path, *bias: float) -> str:
    """A checkpoint that predicts about `bias` in every cell."""
    state = torch.load(checkpoint)
    state["model"]["head.bias"][:] = torch.tensor(bias)
    torch.save(state, path)
    return str(path)


def test_detect_speaks_of_the_picture_as_a_viewer_shows_it(
    tmp_path: Path, checkpoint: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (96, 64)).save(tmp_path / "a.jpg", exif=exif)
    out = tmp_path / "found"
    sure = with_bias(checkpoint, tmp_path / "sure.pt", 0, 0, 0.1, 0.1, 1, 0, 1)
    detect.main([sure, str(tmp_path / "a.jpg"), *flags(out=out)])
    assert Image.open(out / "a.jpg.png").size == (64, 96)
    boxes = json.loads((out / "a.jpg.json").read_text())
    assert max(box["y"] for box in boxes) > 64 > max(box["x"] for box in boxes)


def test_infinite_maps_give_valid_json(tmp_path: Path, checkpoint: Path) -> None:
    bias = torch.inf, 0, 1e38, -torch.inf, 0, torch.nan, 1
    infinite = with_bias(checkpoint, tmp_path / "infinite.pt", *bias)
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    out = tmp_path / "found"
    detect.main([infinite, str(tmp_path / "a.png"), *flags(out=out)])
    assert json.loads((out / "a.png.json").read_text()) == []


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (40_000, 5)])
def test_detect_takes_pictures_of_any_shape(
    tmp_path: Path, checkpoint: Path, size: tuple[int, int]
) -> None:
    Image.new("L", size).save(tmp_path / "a.png")
    detect.main([str(checkpoint), str(tmp_path / "a.png"), *flags(out=tmp_path / "out")])
    assert Image.open(tmp_path / "out" / "a.png.png").size == size


def wide_scene(index: int) -> Scene:
    """A picture of 320 x 180 pixels, its first word illegible, the others with a comma."""
    scene = GeneratedText(8, 128)[index].resized(320, 180)
    words = ILLEGIBLE, *["a, b"] * len(scene.words)
    return replace(scene, words=words[: len(scene.words)])


@pytest.mark.parametrize("crop", [[], ["--crop"]])
def test_an_icdar_folder_trains_and_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], crop: list[str]
) -> None:
    write_icdar(tmp_path / "icdar", map(wide_scene, range(8)), "jpg")
    out = tmp_path / "run"
    quick = {"size": 64, "batch": 2, "workers": 0, "steps": 2, "device": "cpu"}
    train_main([*flags(**quick, data=tmp_path / "icdar", out=out), *crop])
    said = capsys.readouterr().out
    assert "7 pictures to train on, 1 held out" in said
    lost = "words of 8 pictures are lost to the input size: less than 8 pixels high at 64 x 64"
    assert (lost in said) == (not crop)
    trained = json.loads((out / "score.json").read_text())
    evaluate.main([str(out / "checkpoint.pt"), "--data", str(tmp_path / "icdar")])
    assert "F-measure" in capsys.readouterr().out
    held_out = LabelledPictures(tmp_path / "icdar")[7]
    width, height = (320, 180) if crop else (64, 64)
    quads = held_out.resized(width, height).quads
    wanted = Grid(16, 64, 64).readable(quads, width, height) & held_out.legible
    assert trained["words"] == wanted.sum() > 0
    assert Image.open(out / "detections.png").size == ((4 * 320, 180) if crop else (4 * 64, 64))


@pytest.mark.parametrize("picture", ["a.png", "b.png"])
def test_no_memory_for_one_picture_does_not_end_detect(
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    picture: str,
) -> None:
    for name in ("a.png", "b.png"):
        Image.new("L", (64, 64) if name == picture else (32, 32)).save(tmp_path / name)
    forward = FCRN.forward

    def forward_or_fail(self: FCRN, pictures: torch.Tensor) -> torch.Tensor:
        if pictures.shape[2] == 64:
            torch.empty(2**60, dtype=torch.uint8)
        return forward(self, pictures)

    monkeypatch.setattr(FCRN, "forward", forward_or_fail)
    out = tmp_path / "out"
    command = [str(checkpoint), *(str(tmp_path / name) for name in ("a.png", "b.png"))]
    with pytest.raises(SystemExit):
        detect.main([*command, *flags(out=out, device="cpu")])
    said = capsys.readouterr().err
    assert f"skipped {tmp_path / picture}: no memory for 64 x 64 pixels at scale 1" in said
    assert len(list(out.glob("*.json"))) == 1


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
        (["CHECKPOINT", ".", "--threshold", "2"], "--threshold: 2.0 is not between 0 and 1"),
        (["CHECKPOINT", ".", "--overlap", "nan"], "--overlap: nan is not between 0 and 1"),
        (["CHECKPOINT", ".", "--scales", "0"], "--scales: 0.0 is not above 0 and finite"),
        (["CHECKPOINT", ".", "--scales", "1", "nan"], "--scales: nan is not above 0 and finite"),
        (["CHECKPOINT", ".", "--scales", "inf"], "--scales: inf is not above 0 and finite"),
        (["CHECKPOINT", ".", "--scales", "one"], "--scales: 'one' is not a number"),
        (["CHECKPOINT", "PICTURE", "--scales", "1e308"], "1 of 1 pictures were skipped"),
        (["CHECKPOINT", "PICTURE", "--scales", "1e9"], "1 of 1 pictures were skipped"),
        (
            ["CHECKPOINT", "PICTURE", "--out", "PICTURE"],
            "cannot make the folder PICTURE: File exists",
        ),
        (["CHECKPOINT", "PICTURE", "--out", "FOLDER"], "is the folder of PICTURE; name another"),
        (["CHECKPOINT", "PICTURE", "--out", "/proc/found"], "cannot make the folder /proc/found"),
    ],
)
def test_detect_says_what_is_wrong(
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    picture = tmp_path / "a.png"
    Image.new("L", (64, 64)).save(picture)
    places = {"CHECKPOINT": checkpoint, "PICTURE": picture, "FOLDER": tmp_path}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    message = message.replace("PICTURE", str(picture))
    assert message in refused(arguments, capsys, detect.main)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "0 is not at least 1"),
        (["--stride", "12"], "invalid choice: 12"),
        (["--size", "250"], "--size 250 is no multiple of --stride 16"),
        (["--data", "nowhere"], "there is no file or folder nowhere"),
        (["--data", "EMPTY"], "has neither SynthText's gt.mat, nor a COCO-style .json file, nor"),
        (["--crop"], "--crop needs --data"),
        (["--learning-rate", "-1"], "--learning-rate must be above 0"),
        (["--anneal", "0"], "--anneal must be above 0 and at most 1"),
        (["--device", "tpu9"], "--device"),
        (["--resume"], "there is no checkpoint"),
    ],
)
def test_train_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    arguments = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    command = [*arguments, "--out", str(tmp_path / "run")]
    assert message in refused(command, capsys, train_main)


def test_a_command_without_a_name_lists_them() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "examples.text_detection"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 2
    assert "keras-question" in listed.stdout
