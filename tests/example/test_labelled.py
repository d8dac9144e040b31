"""Data sets as people have them: ICDAR's text files, COCO-style JSON, what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from icdar_files import write_icdar
from PIL import Image

from examples.text_detection.batches import CodedScenes
from examples.text_detection.errors import UserError
from examples.text_detection.evaluate import detections, evaluate
from examples.text_detection.generator import GeneratedText
from examples.text_detection.grid import IGNORE, Grid, quad_to_pose
from examples.text_detection.labelled import LabelledPictures, lost_words
from examples.text_detection.model import FCRN
from examples.text_detection.scene import ILLEGIBLE
from examples.text_detection.synthtext import write_synthtext

BOX = [[10, 20], [40, 20], [40, 32], [10, 32]]
LINE = "10,20,40,20,40,32,10,32,"


def picture(path: Path, size: tuple[int, int] = (128, 96)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path)
    return path


def icdar(folder: Path, *texts: str | bytes) -> Path:
    """A set with one picture for each text."""
    for number, text in enumerate(texts, start=1):
        picture(folder / f"img_{number}.jpg")
        contents = text if isinstance(text, bytes) else text.encode()
        (folder / f"gt_img_{number}.txt").write_bytes(contents)
    return folder


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (LINE + "Tea, Room", "Tea, Room"),
        (LINE, ""),
        (LINE[:-1], ""),
        (LINE + "###", ILLEGIBLE),
        ("10.0, 20.0, 40, 20, 40, 32, 10, 32, word", "word"),
        ("10,20,10,32,40,32,40,20,counter-clockwise", "counter-clockwise"),
        ('10, 20, 40, 32, "Footpath"', "Footpath"),
        ('10 20 40 32 "To"', "To"),
        ("10,20,40,32,12", "12"),
        (LINE + "0800 12 34 56 78", "0800 12 34 56 78"),
        ('10, 20, 40, 32, "a ""b"', 'a ""b'),
    ],
)
def test_a_line_of_icdar_is_a_word(tmp_path: Path, line: str, word: str) -> None:
    scene = LabelledPictures(icdar(tmp_path, line))[0]
    assert scene.words == (word,)
    assert scene.quads[0].tolist() == BOX


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xef\xbb\xbf" + f"{LINE}Zürich\r\n{LINE}two\r\n\r\n".encode(), ("Zürich", "two")),
        (f"{LINE}Zürich".encode("latin-1"), ("Z\ufffdrich",)),
        (f"{LINE}a\u2028b\n".encode(), ("a\u2028b",)),
        (b"", ()),
        (b"\xef\xbb\xbf\r\n", ()),
    ],
)
def test_text_files_as_the_wild_has_them(
    tmp_path: Path, text: bytes, words: tuple[str, ...]
) -> None:
    scene = LabelledPictures(icdar(tmp_path, text))[0]
    assert scene.words == words
    assert scene.quads.shape == (len(words), 4, 2)


def test_text_files_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "training_images" / "img_1.JPG")
    (tmp_path / "training_gt").mkdir()
    (tmp_path / "training_gt" / "gt_img_1.txt").write_text(LINE + "one")
    (tmp_path / "readme.txt").write_text("not a word")
    assert LabelledPictures(tmp_path)[0].words == ("one",)


def test_sets_beside_each_other_may_have_the_same_names(tmp_path: Path) -> None:
    icdar(tmp_path / "test", LINE + "one")
    icdar(tmp_path / "train", LINE + "two")
    scenes = LabelledPictures(tmp_path)
    assert [scenes[index].words for index in range(2)] == [("one",), ("two",)]
    (tmp_path / "train" / "gt_img_1.txt").rename(tmp_path / "img_1.txt")
    (tmp_path / "test" / "gt_img_1.txt").unlink()
    with pytest.raises(UserError, match=r"img_1\.jpg have the same name; name the folder of one"):
        LabelledPictures(tmp_path)


def test_a_picture_without_a_text_file_is_left_out(tmp_path: Path) -> None:
    icdar(tmp_path, LINE + "one")
    picture(tmp_path / "more.png")
    with pytest.warns(UserWarning, match="1 of 2 pictures have no text file and 0 text"):
        assert len(LabelledPictures(tmp_path)) == 1


def test_a_line_that_is_no_word_is_named(tmp_path: Path) -> None:
    icdar(tmp_path, f"{LINE}one\n10,20,x,32,two")
    with pytest.raises(UserError, match=r"line 2 of .*gt_img_1\.txt is neither .*'10,20,x,32,two'"):
        LabelledPictures(tmp_path)


def coco(folder: Path, annotations: Iterable[dict], name: str = "a.jpg") -> Path:
    folder.mkdir(exist_ok=True)
    image = {"id": 7, "file_name": name, "width": 128, "height": 96}
    own = [{"image_id": 7, **annotation} for annotation in annotations]
    (folder / "labels.json").write_text(json.dumps({"images": [image], "annotations": own}))
    return folder


FLAT = [10, 20, 40, 20, 40, 32, 10, 32]


@pytest.mark.parametrize(
    "annotation",
    [
        {"segmentation": [FLAT]},
        {"segmentation": [FLAT[4:] + FLAT[:4]]},  # from another corner
        {"segmentation": [[10, 32, 40, 32, 40, 20, 10, 20]]},  # counter-clockwise
        {"segmentation": [[10, 20, 25, 20, 40, 20, 40, 32, 25, 30, 10, 32]]},  # more corners
        {"segmentation": [[10, 20, 20, 20, 20, 32, 10, 32], [20, 20, 40, 20, 40, 32]]},
        {"bbox": [10, 20, 30, 12]},
        {"bbox": [10, 20, 30, 12], "segmentation": []},
        {"bbox": [10, 20, 30, 12], "segmentation": [[]]},
        {"bbox": [10, 20, 30, 12], "segmentation": {"counts": "1", "size": [96, 128]}},
    ],
)
def test_an_annotation_of_coco_is_a_rectangle(tmp_path: Path, annotation: dict) -> None:
    picture(tmp_path / "a.jpg")
    scene = LabelledPictures(coco(tmp_path, [annotation | {"text": "one"}]))[0]
    assert scene.quads[0] == pytest.approx(np.array(BOX), abs=1e-3)
    assert scene.words == ("one",)


@pytest.mark.parametrize("degrees", [-80, -45, -10, 30, 60, 89])
def test_a_polygon_is_read_along_its_longer_side(tmp_path: Path, degrees: float) -> None:
    theta = np.radians(degrees)
    along, down = (
        np.array([np.cos(theta), np.sin(theta)]),
        np.array([-np.sin(theta), np.cos(theta)]),
    )
    corners = [
        (60, 50) + 20 * u * along + 5 * v * down for u, v in ((1, 1), (1, -1), (-1, -1), (-1, 1))
    ]
    polygon = np.ravel(corners).tolist()
    picture(tmp_path / "a.jpg")
    quads = LabelledPictures(coco(tmp_path, [{"segmentation": [polygon]}]))[0].quads
    assert quad_to_pose(quads)[0] == pytest.approx([60, 50, 40, 10, theta], abs=1e-2)


def test_words_of_coco_that_nobody_is_asked_to_find(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    marks = [
        {"iscrowd": 1},
        {"ignore": True},
        {"legibility": "illegible"},
        {"utf8_string": ILLEGIBLE},
        {"utf8_string": "two", "legibility": "legible", "iscrowd": 0},
    ]
    scene = LabelledPictures(coco(tmp_path, [{"segmentation": [FLAT], **mark} for mark in marks]))[
        0
    ]
    assert scene.words == (ILLEGIBLE,) * 4 + ("two",)
    assert scene.legible.tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("name", ["a.jpg", "elsewhere/a.jpg", "images\\a.jpg ", "images/a.jpg"])
def test_coco_names_pictures_in_many_ways(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "images" / "a.jpg")
    scenes = LabelledPictures(coco(tmp_path, [], name) / "labels.json")
    assert scenes[0].picture.shape == (96, 128, 3)
    assert scenes[0].words == ()


def test_a_json_file_that_is_not_coco_is_explained(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    folder = coco(tmp_path, [{"segmentation": [[1, 2, 3]]}])
    with pytest.raises(
        UserError, match=r"an entry of .*labels\.json is not COCO's: cannot reshape"
    ):
        LabelledPictures(folder)
    (tmp_path / "more.json").write_text((tmp_path / "labels.json").read_text())
    with pytest.raises(UserError, match=r"name one of the files .*labels\.json, .*more\.json"):
        LabelledPictures(folder)
    (tmp_path / "more.json").write_text("[1]")
    with pytest.raises(UserError, match=r"more\.json is no JSON file with COCO's"):
        LabelledPictures(tmp_path / "more.json")


def test_a_folder_of_no_format_is_explained(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither SynthText's gt.mat, .*COCO-style .*ICDAR's text"):
        LabelledPictures(tmp_path)
    with pytest.raises(UserError, match="there is no file or folder"):
        LabelledPictures(tmp_path / "nowhere")


def test_pictures_that_are_not_there(tmp_path: Path) -> None:
    folder = coco(tmp_path, [])
    with pytest.raises(
        UserError, match=r"not one of the 1 pictures .* can be read: .* no .*a\.jpg"
    ):
        LabelledPictures(folder)
    contents = json.loads((folder / "labels.json").read_text())
    contents["images"].append({"id": 8, "file_name": "b.jpg"})
    (folder / "labels.json").write_text(json.dumps(contents))
    picture(folder / "b.jpg", (40, 40))
    with pytest.warns(UserWarning, match=r"1 of the 2 pictures of .* are not there .*a\.jpg"):
        scenes = LabelledPictures(folder)
    assert [scene.picture.shape for scene in scenes] == [(40, 40, 3)]


def test_pictures_none_of_which_can_be_read(tmp_path: Path) -> None:
    icdar(tmp_path, LINE + "one", LINE + "two")
    pictures = tmp_path / "img_1.jpg", tmp_path / "img_2.jpg"
    pictures[0].write_text("version https://git-lfs.github.com/spec/v1")
    assert len(LabelledPictures(tmp_path)) == 2
    pictures[1].write_bytes(b"")
    with pytest.raises(
        UserError, match=r"not one of the 2 pictures of .* can be read: .*img_1\.jpg"
    ):
        LabelledPictures(tmp_path)


def test_illegible_words_are_ignored_cells_and_no_part_of_the_score(tmp_path: Path) -> None:
    one, two = "20,20,80,20,80,40,20,40,", "20,60,80,60,80,80,20,80,"
    scenes = LabelledPictures(icdar(tmp_path, f"{one}seen\n{two}###"))
    confidence = CodedScenes(scenes, Grid(16, 128, 96))[0][1][6]
    assert (confidence == 1).nonzero().tolist() == [[1, 3]]
    assert confidence[4, 1:5].tolist() == [IGNORE] * 4
    grid = Grid(16, 128, 96)
    assert evaluate(grid, detections(FCRN(), grid, scenes)).words == 1


def test_words_that_stretching_makes_too_low_are_counted(tmp_path: Path) -> None:
    lines = [
        f"0,{top},200,{top},200,{top + high},0,{top + high},word"
        for top, high in ((0, 60), (100, 30), (200, 20), (300, 7))
    ]
    lines.append("0,400,200,400,200,420,0,420,###")
    icdar(tmp_path, "\n".join(lines))
    picture(tmp_path / "img_1.jpg", (1280, 720))
    scenes = LabelledPictures(tmp_path)
    # At 256 x 256 heights shrink by 720 / 256: 60, 30 and 20 pixels become 21, 11 and 7.
    assert lost_words(scenes, Grid(16, 256, 256)) == (1, 3, 1)
    assert lost_words(scenes, Grid(16, 1024, 1024)) == (0, 3, 1)
    (tmp_path / "img_1.jpg").write_bytes(b"spoilt")
    assert lost_words(scenes, Grid()) == (0, 0, 1)


def test_an_icdar_set_is_what_was_generated(tmp_path: Path) -> None:
    """The corners, written as ICDAR writes them, survive to half a pixel."""
    there = [GeneratedText(3, 128)[index] for index in range(3)]
    write_synthtext(there, tmp_path / "mat")
    write_icdar(tmp_path / "icdar", there, "png")
    mat, text = LabelledPictures(tmp_path / "mat"), LabelledPictures(tmp_path / "icdar")
    for index in range(3):
        assert np.array_equal(mat[index].picture, text[index].picture)
        assert mat[index].words == text[index].words
        assert np.abs(mat[index].quads - text[index].quads).max() <= 0.5


@pytest.mark.parametrize(
    "line",
    [
        "0,0,10,0,20,5,20,10,10,15,0,10,5,5,word",  # a polygon of more corners
        "0,0,10,0,20,5,20,10,10,15,0,10,5,5",
    ],
)
def test_a_polygon_is_not_taken_for_four_corners(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=r"line 1 of .*gt_img_1\.txt is neither"):
        LabelledPictures(icdar(tmp_path, line))


def test_boxes_in_units_of_the_picture_are_refused(tmp_path: Path) -> None:
    """As YOLO has them: class, middle and size."""
    with pytest.raises(UserError, match="smaller than 2 pixels: are they in pixels"):
        LabelledPictures(icdar(tmp_path, "0 0.5 0.5 0.3 0.2\n0 0.1 0.7 0.2 0.1"))


def test_words_of_the_sets_with_languages_may_be_illegible(tmp_path: Path) -> None:
    scene = LabelledPictures(icdar(tmp_path, f"{LINE}Latin,###\n{LINE}Latin,one"))[0]
    assert scene.legible.tolist() == [False, True]


def test_text_files_without_their_pictures(tmp_path: Path) -> None:
    icdar(tmp_path, LINE + "one", LINE + "two")
    (tmp_path / "img_2.jpg").unlink()
    with pytest.warns(UserWarning, match="0 of 1 pictures have no .* 1 text files have no picture"):
        assert len(LabelledPictures(tmp_path)) == 1
    (tmp_path / "img_1.jpg").unlink()
    with pytest.raises(UserError, match=r"none of the 2 text files in .* has its picture"):
        LabelledPictures(tmp_path)


def test_linked_folders_are_followed_and_hidden_ones_are_not(tmp_path: Path) -> None:
    icdar(tmp_path / "elsewhere", LINE + "one")
    icdar(tmp_path / "set" / ".cache", LINE + "old")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    scenes = LabelledPictures(tmp_path / "set")
    assert [scenes[index].words for index in range(len(scenes))] == [("one",)]
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "set", target_is_directory=True)
    assert len(LabelledPictures(tmp_path / "set")) == 1


def two_images(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"id": index, "file_name": name} for index, name in enumerate(names)]
    contents = {"images": images, "annotations": []}
    (folder / "labels.json").write_text(json.dumps(contents))
    return folder


def test_pictures_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "train" / "1.jpg", (30, 20))
    picture(tmp_path / "images" / "val" / "1.jpg", (50, 40))
    scenes = LabelledPictures(two_images(tmp_path, "val/1.jpg", "train/1.jpg"))
    assert [scenes[index].picture.shape[:2] for index in range(2)] == [(40, 50), (20, 30)]
    (tmp_path / "images" / "train" / "1.jpg").unlink()
    with pytest.warns(UserWarning, match=r"1 of the 2 pictures .*train/1\.jpg"):
        scenes = LabelledPictures(two_images(tmp_path, "val/1.jpg", "train/1.jpg"))
    assert [scene.picture.shape[:2] for scene in scenes] == [(40, 50)]
    picture(tmp_path / "images" / "train" / "1.jpg", (30, 20))
    with pytest.raises(UserError, match=r"1\.jpg and .*1\.jpg may both be the picture 1\.jpg"):
        LabelledPictures(two_images(tmp_path, "1.jpg"))


def test_cocos_own_folders(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg")
    two_images(tmp_path / "annotations", "a.jpg")
    assert len(LabelledPictures(tmp_path)) == 1
    assert len(LabelledPictures(tmp_path / "annotations" / "labels.json")) == 1


def test_an_annotation_of_no_image_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"not COCO's: no image has the id '7'"):
        LabelledPictures(coco(tmp_path, [{"image_id": "7", "bbox": [1, 2, 3, 4]}]))
    with pytest.raises(UserError, match="not COCO's: it has no 'bbox'"):
        LabelledPictures(coco(tmp_path, [{}]))
    contents = json.loads((tmp_path / "labels.json").read_text())
    contents["images"] *= 2
    (tmp_path / "labels.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match="not COCO's: two images have the same id"):
        LabelledPictures(tmp_path)
