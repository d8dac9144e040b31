"""The labels of ICDAR's competitions on scene text: a text file for each picture.

The file of the picture NAME is `gt_NAME.txt` or `NAME.txt`, in UTF-8 with or without a byte order
mark, in the same folder as the picture or in another one of the set. Each line is a word:

    x1,y1,x2,y2,x3,y3,x4,y4,transcription       2015: corners, clockwise from the top left
    left, top, right, bottom, "transcription"   2013, whose training set has blanks for commas

A transcription may hold commas; `###` says that nobody is asked to find the word. Source: the
tasks' pages, https://rrc.cvc.uab.es, "Focused" and "Incidental Scene Text".
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import files_below
from .scene import ILLEGIBLE, SUFFIXES, Label

_NUMBER = r"[-+]?\d+(?:\.\d*)?"
_COMMA = r"(?:\s*,\s*|\s+)"
_CORNERS, _SIDES = (
    re.compile(rf"\s*({_NUMBER}(?:{_COMMA}{_NUMBER}){{{count - 1}}})(?:{_COMMA}(.*))?")
    for count in (8, 4)
)
_POLYGON = re.compile(rf"(?:{_NUMBER}\s*,\s*){{4}}")  # after four corners: it has more


def read_icdar(folder: Path) -> list[Label]:
    """The pictures below `folder` that have a text file, by name; none if there is no such.

    Of several text files of one name, that in the picture's own folder is taken.

    UserError: a line is no word, it is not clear which picture a text file belongs to, or there
        are text files `gt_NAME.txt` and not one of their pictures.
    """
    files = files_below(folder)
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    texts = defaultdict(list)
    for path in files:
        if path.suffix.lower() == ".txt":
            texts[path.stem.removeprefix("gt_")].append(path)
    labels: dict[Path, Label] = {}
    for path in pictures:
        found = texts.get(path.stem, [])
        found = [text for text in found if text.parent == path.parent] or found
        rivals = found[1:] + [labels[text].path for text in found if text in labels]
        if rivals:
            raise UserError(
                f"{path}, {found[0]} and {rivals[0]} have the same name; name the folder of one set"
            )
        if found:
            labels[found[0]] = _read_words(found[0], path)
    alone = [path for path in files if path.match("gt_*.txt") and path not in labels]
    if alone and not labels:
        raise UserError(f"none of the {len(alone)} text files in {folder} has its picture")
    if labels and (alone or len(labels) < len(pictures)):
        warnings.warn(
            f"in {folder}, {len(pictures) - len(labels)} of {len(pictures)} pictures have no text "
            f"file and {len(alone)} text files have no picture; they are left out",
            stacklevel=2,
        )
    return list(labels.values())


def _read_words(text: Path, picture: Path) -> Label:
    """The words in one text file."""
    quads, words = [], []
    lines = text.read_text("utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if (match := _CORNERS.fullmatch(line.rstrip())) and not _POLYGON.match(match[2] or ""):
            quads.append(_numbers(match[1]))
        elif not match and (match := _SIDES.fullmatch(line.rstrip())):
            left, top, right, bottom = _numbers(match[1])
            quads.append([left, top, right, top, right, bottom, left, bottom])
        else:
            raise UserError(
                f"line {number} of {text} is neither x1,y1,x2,y2,x3,y3,x4,y4,transcription nor "
                f"left,top,right,bottom,transcription: {line.strip()[:60]!r}"
            )
        word = (match[2] or "").strip()
        word = word[1:-1] if len(word) > 1 and word[0] == word[-1] == '"' else word
        # The sets of 2017 and 2019 have the language before the word.
        words.append(ILLEGIBLE if word.endswith("," + ILLEGIBLE) else word)
    corners = np.array(quads, np.float32).reshape(-1, 4, 2)
    (x1, y1), (x2, y2) = (corners[:, 2] - corners[:, 0]).T, (corners[:, 3] - corners[:, 1]).T
    backwards = x1 * y2 < x2 * y1  # some write the corners counter-clockwise
    corners[backwards] = corners[backwards][:, [0, 3, 2, 1]]
    return Label(picture, corners, tuple(words))


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(_NUMBER, text)]
