"""Labels in a COCO-style JSON file: `images` and `annotations`, one of these for each word.

The file lies with its pictures or, as COCO's own, in a folder `annotations` beside theirs. Of an
image these are used: `id` and `file_name`, the end of the picture's path. Of an annotation:
`image_id`; the polygons in `segmentation`, or where there are none `bbox`, (left, top, width,
height); the word in `text` or `utf8_string`; and `iscrowd`, `ignore` or `legibility` "illegible",
which say that nobody is asked to find it. Source:
https://cocodataset.org/#format-data; `utf8_string` and `legibility` are names that COCO-Text uses.

Polygons have no first corner: a word becomes the smallest rectangle around its polygons, read along
its longer side from left to right.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .files import files_below
from .grid import pose_to_quad
from .scene import ILLEGIBLE, Label


def read_coco(source: Path) -> list[Label]:
    """The images of `source`, a JSON file or the folder of one; none if there is no such file.

    UserError: a file given by name is not COCO's, a folder holds several, an entry is damaged.
    """
    files = [source]
    if source.is_dir():
        files = sorted([*source.glob("*.json"), *source.glob("annotations/*.json")])
    contents = {path: found for path in files if (found := _contents(path))}
    if len(contents) > 1:
        raise UserError(f"name one of the files {', '.join(map(str, contents))}, not their folder")
    if not contents and source.is_file():
        raise UserError(f"{source} is no JSON file with COCO's `images` and `annotations`")
    for path, found in contents.items():
        folder = path.parent.parent if path.parent.name == "annotations" else path.parent
        try:
            return _labels(folder, found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            missing = "it has no " if isinstance(error, KeyError) else ""
            raise UserError(f"an entry of {path} is not COCO's: {missing}{error}") from None
    return []


def _contents(path: Path) -> dict[str, Any] | None:
    """What a COCO-style file holds; None if it is something else."""
    try:
        contents = json.loads(path.read_text("utf-8-sig"))
    except ValueError:
        return None
    lists = ("images", "annotations")
    is_coco = isinstance(contents, dict) and all(isinstance(contents.get(k), list) for k in lists)
    return contents if is_coco else None


def _labels(folder: Path, contents: dict[str, Any]) -> list[Label]:
    annotations: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in contents["images"]}
    if len(annotations) < len(contents["images"]):
        raise ValueError("two images have the same id")
    for annotation in contents["annotations"]:
        if annotation["image_id"] not in annotations:
            raise ValueError(f"no image has the id {annotation['image_id']!r} of an annotation")
        annotations[annotation["image_id"]].append(annotation)
    names = [str(image["file_name"]).strip().replace("\\", "/") for image in contents["images"]]
    labels = []
    for path, own in zip(_paths(folder, names), annotations.values(), strict=True):
        quads = np.array([_quad(annotation) for annotation in own], np.float32).reshape(-1, 4, 2)
        labels.append(Label(path, quads, tuple(map(_word, own))))
    return labels


def _paths(folder: Path, names: list[str]) -> list[Path]:
    """The files of pictures called `names`, in `folder` or below it.

    A picture that is in another folder than its name says is found by the last part of its name,
    if no other has the same.
    """
    paths = [folder / name for name in names]
    if all(path.is_file() for path in paths):
        return paths
    below = defaultdict(list)
    for path in files_below(folder):
        below[path.name].append(path)
    times = Counter(path.name for path in paths)
    for index, path in enumerate(paths):
        if path.is_file():
            continue
        found = [file for file in below[path.name] if str(file).endswith(f"/{names[index]}")]
        if not found and times[path.name] == 1:
            found = below[path.name]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} may both be the picture {names[index]}")
        paths[index] = found[0] if found else path
    return paths


def _word(annotation: dict[str, Any]) -> str:
    hidden = annotation.get("iscrowd") or annotation.get("ignore")
    if hidden or annotation.get("legibility") == "illegible":
        return ILLEGIBLE
    return str(annotation.get("text") or annotation.get("utf8_string") or "").replace("\n", " ")


def _quad(annotation: dict[str, Any]) -> NDArray[np.float32]:
    """The corners (4, 2) of one word."""
    polygons = annotation.get("segmentation")
    polygons = list(filter(None, polygons)) if isinstance(polygons, list) else []  # else a mask
    if not polygons:
        left, top, width, height = map(float, annotation["bbox"])
        return pose_to_quad(np.float32([[left + width / 2, top + height / 2, width, height, 0]]))[0]
    points = np.concatenate([np.float32(polygon).reshape(-1, 2) for polygon in polygons])
    (x, y), (width, height), degrees = cv2.minAreaRect(points)
    if height > width:
        width, height, degrees = height, width, degrees + 90
    theta = np.radians((degrees + 90) % 180 - 90)  # within [-90, 90) degrees: not upside down
    return pose_to_quad(np.float32([[x, y, width, height, theta]]))[0]
