"""Find words in pictures: boxes as JSON and drawn.

    python -m examples.text_detection.detect runs/train/checkpoint.pt PICTURES --out runs/detect

PICTURES are files or folders. A picture called NAME gets NAME.json, a list of
{"quad": [[x, y] x 4], "x", "y", "w", "h", "theta", "score"}, in pixels and radians, surest first,
and NAME.png with the boxes drawn. A picture that cannot be read is named and passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from .detection import detect
from .draw import draw_boxes
from .errors import UserError, exit_on_user_error
from .grid import Boxes
from .processes import usable
from .scene import read_picture
from .training import load_model

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def pictures_of(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` and the pictures in its folders, by name; UserError if none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no file or folder {path}")
    if not found:
        raise UserError("there is no picture in " + ", ".join(map(str, paths)))
    names = [path.name for path in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two pictures are called {name}; name their folders one at a time")
    return found


def as_json(boxes: Boxes) -> list[dict[str, Any]]:
    """The boxes as plain values, numbers rounded to a hundredth of a pixel."""
    return [
        {
            "quad": [[round(float(x), 2), round(float(y), 2)] for x, y in quad],
            **{name: round(float(value), 4) for name, value in zip("xywh", pose, strict=False)},
            "theta": round(float(pose[4]), 4),
            "score": round(float(score), 4),
        }
        for quad, pose, score in zip(boxes.quads, boxes.poses, boxes.scores, strict=True)
    ]


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="detect",
        description="Find words in pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="what `train` wrote")
    parser.add_argument("pictures", type=Path, nargs="+", help="files or folders")
    parser.add_argument("--out", type=Path, default=Path("runs/detect"))
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.125])
    parser.add_argument("--threshold", type=float, default=0.3, help="least confidence of a box")
    parser.add_argument("--overlap", type=float, default=0.3, help="of boxes that are one word")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    options = parser.parse_args(arguments)
    for name in ("threshold", "overlap"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"--{name} must be between 0 and 1, not {getattr(options, name)}")
    if min(options.scales) <= 0:
        raise UserError(f"--scales must be above 0, not {min(options.scales)}")
    model, grid = load_model(options.checkpoint, usable(options.device))
    paths = pictures_of(options.pictures)
    options.out.mkdir(parents=True, exist_ok=True)

    unread = []
    for path in tqdm(paths, "detect"):
        try:
            picture = read_picture(path)
        except UserError as error:
            tqdm.write(f"passed over: {error}", file=sys.stderr)
            unread.append(path)
            continue
        boxes = detect(model, grid, picture, options.scales, options.threshold, options.overlap)
        (options.out / f"{path.name}.json").write_text(json.dumps(as_json(boxes), indent=1) + "\n")
        Image.fromarray(draw_boxes(picture, boxes)).save(options.out / f"{path.name}.png")
    print(f"{len(paths) - len(unread)} of {len(paths)} pictures done, in {options.out}")
    if unread:
        raise UserError(f"{len(unread)} of {len(paths)} pictures could not be read")


if __name__ == "__main__":
    main()
