"""SynthText's format: read as it lies on disk, with its traps, and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from examples.text_detection.batches import load
from examples.text_detection.errors import UserError
from examples.text_detection.generator import GeneratedText, Style
from examples.text_detection.grid import IGNORE, Grid
from examples.text_detection.labelled import LabelledPictures
from examples.text_detection.scene import Scene
from examples.text_detection.synthtext import write_synthtext


def scene(quads: list, words: tuple[str, ...] = ()) -> Scene:
    array = np.array(quads, np.float32).reshape(-1, 4, 2)
    return Scene(np.zeros((60, 100, 3), np.uint8), array, words or ("word",) * len(array))


BOX = [[10, 20], [40, 20], [40, 32], [10, 32]]


def box_at(x: float, y: float) -> list:
    return (np.array(BOX) - BOX[0] + [x, y]).tolist()


def test_what_was_generated_is_read_back(tmp_path: Path) -> None:
    scenes = GeneratedText(6, style=Style(words=(0, 3)))
    write_synthtext((scenes[index] for index in range(6)), tmp_path)
    read = LabelledPictures(tmp_path)
    assert len(read) == 6
    for index in range(6):
        there, back = scenes[index], read[index]
        assert np.array_equal(back.picture, there.picture)
        assert np.array_equal(back.quads, there.quads)
        assert back.words == there.words


def test_a_single_word_is_2_x_4_on_disk_and_n_x_4_x_2_here(tmp_path: Path) -> None:
    write_synthtext([scene([BOX]), scene([BOX, box_at(50, 40)]), scene([])], tmp_path)
    cells = scipy.io.loadmat(tmp_path / "gt.mat")["wordBB"]
    assert cells.shape == (1, 3)
    assert cells[0, 0].shape == (2, 4)
    assert cells[0, 0].tolist() == np.transpose(BOX).tolist()  # the row of x, the row of y
    assert cells[0, 1].shape == (2, 4, 2)
    read = LabelledPictures(tmp_path)
    assert [read[index].quads.shape for index in range(3)] == [(1, 4, 2), (2, 4, 2), (0, 4, 2)]
    assert read[0].quads[0].tolist() == BOX


def test_boxes_wholly_outside_are_dropped_with_their_words(tmp_path: Path) -> None:
    boxes = [box_at(-80, 20), BOX, box_at(90, 50), box_at(20, 61)]
    write_synthtext([scene(boxes, ("left", "in", "cut", "below"))], tmp_path)
    read = LabelledPictures(tmp_path)[0]
    assert read.words == ("in", "cut")
    assert read.quads[:, 0].tolist() == [[10, 20], [90, 50]]


def test_instances_of_several_lines_are_parted_into_words(tmp_path: Path) -> None:
    write_synthtext([scene([BOX, BOX, BOX])], tmp_path)
    contents = scipy.io.loadmat(tmp_path / "gt.mat")
    contents["txt"][0, 0] = np.array(["Lines:\nI", "lost    "])  # padded, as MATLAB pads
    columns = {name: contents[name] for name in ("imnames", "wordBB", "txt")}
    scipy.io.savemat(tmp_path / "gt.mat", columns)
    assert LabelledPictures(tmp_path)[0].words == ("Lines:", "I", "lost")


def test_workers_code_the_scenes_of_any_size(tmp_path: Path) -> None:
    write_synthtext([scene([box_at(11, 20)]), scene([box_at(60, 30)])], tmp_path)
    (batch,) = load(
        LabelledPictures(tmp_path), Grid(16, 128, 128, min_height=4), [[0, 1]], workers=2
    )
    pictures, target, _ = batch
    assert pictures.shape == (2, 3, 128, 128)
    # The middle (26, 26) of 100 x 60 pixels is (33.3, 55.5) of 128 x 128.
    assert (target[0, 6] == 1).nonzero().tolist() == [[3, 2]]
    assert target[0, 2, 3, 2] == pytest.approx(30 / 100)


def test_a_spoilt_picture_counts_for_nothing(tmp_path: Path) -> None:
    write_synthtext([scene([BOX])], tmp_path)
    scenes = LabelledPictures(tmp_path)
    (tmp_path / "0" / "000000.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"scene 0 is ignored: cannot read .*000000\.png"):
        (batch,) = load(scenes, Grid(), [[0]], workers=0)
    assert (batch[1][0, 6] == IGNORE).all()


def test_a_set_is_not_overwritten(tmp_path: Path) -> None:
    write_synthtext([scene([BOX])], tmp_path)
    with pytest.raises(UserError, match="exists already"):
        write_synthtext([scene([BOX])], tmp_path)


def two_texts() -> np.ndarray:
    texts = np.empty((1, 2), object)
    texts[0] = ["one", "two"]
    return texts


def columns(**changed: object) -> dict[str, object]:
    cell = np.empty((1, 1), object)
    names, boxes, texts = cell.copy(), cell.copy(), cell.copy()
    names[0, 0], boxes[0, 0], texts[0, 0] = "a.png", np.transpose(BOX), np.array(["word"])
    whole = {"imnames": names, "wordBB": boxes, "txt": texts}
    return {name: value for name, value in {**whole, **changed}.items() if value is not None}


def bad_box() -> np.ndarray:
    boxes = np.empty((1, 1), object)
    boxes[0, 0] = np.zeros((4, 2, 3))
    return boxes


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "has neither SynthText's gt.mat, nor a COCO-style"),
        (b"not a MAT file", "cannot read .*gt.mat as a MATLAB file"),
        (columns(wordBB=None), "is not SynthText's: it has no wordBB"),
        (columns(txt=two_texts()), "1 imnames, 1 wordBB, 2 txt, not one of each"),
        (columns(wordBB=bad_box()), "wordBB of picture 0 has the shape 4 x 2 x 3, not 2 x 4 x n"),
        ({name: np.empty((1, 0), object) for name in columns()}, "lists no pictures"),
    ],
)
def test_a_wrong_gt_mat_is_explained(tmp_path: Path, contents: object, message: str) -> None:
    if isinstance(contents, bytes):
        (tmp_path / "gt.mat").write_bytes(contents)
    elif contents is not None:
        scipy.io.savemat(tmp_path / "gt.mat", contents)
    with pytest.raises(UserError, match=message):
        LabelledPictures(tmp_path)


def test_names_may_have_backslashes_and_be_padded_with_blanks(tmp_path: Path) -> None:
    names = np.empty((1, 1), object)
    names[0, 0] = np.array(["8\\a.png   "])
    scipy.io.savemat(tmp_path / "gt.mat", columns(imnames=names))
    (tmp_path / "8").mkdir()
    Image.new("L", (20, 10)).save(tmp_path / "8" / "a.png")
    assert LabelledPictures(tmp_path)[0].picture.shape == (10, 20, 3)
