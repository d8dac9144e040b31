"""Find words in pictures: boxes as JSON and drawn.

    python -m examples.text_detection.detect runs/train/checkpoint.pt PICTURES --out runs/detect

PICTURES are files or folders. A picture called NAME gets NAME.json, a list of
{"quad": [[x, y] x 4], "x", "y", "w", "h", "theta", "score"}, in pixels and radians, by score,
and NAME.png with the boxes drawn. Both speak of the picture as a viewer shows it, turned as EXIF
says. A picture that cannot be read is named and skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from .arguments import scale, share
from .detection import SCALES, detect
from .draw import draw_boxes
from .errors import UserError, exit_on_user_error
from .files import make_folder, write_json
from .grid import Boxes
from .processes import usable
from .scene import SUFFIXES, opened, read_picture
from .training import load_model

_SOFTWARE = "fcrn_fused, examples.text_detection.detect"


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
    name, times = Counter(path.name for path in found).most_common(1)[0]
    if times > 1:
        raise UserError(f"two pictures are called {name}; name their folders one at a time")
    return found


def check_out(out: Path, pictures: Iterable[Path]) -> None:
    """UserError where `detect` would write over what is not its own, or beside the pictures.

    A drawing is signed; boxes without their drawing are someone else's.
    """
    for picture in pictures:
        if out.exists() and out.samefile(picture.parent):
            raise UserError(f"--out {out} is the folder of {picture}; name another")
        drawn, boxes = out / f"{picture.name}.png", out / f"{picture.name}.json"
        if (drawn.exists() or boxes.exists()) and not _is_signed(drawn):
            strange = drawn if drawn.exists() else boxes
            raise UserError(f"{strange} exists and is not from `detect`; name another --out")


def _signature() -> PngInfo:
    """Marks a drawing as one that the next run may replace."""
    info = PngInfo()
    info.add_text("Software", _SOFTWARE)
    return info


def _is_signed(path: Path) -> bool:
    try:
        with opened(path) as picture:
            return picture.info.get("Software") == _SOFTWARE
    except UserError:
        return False


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
    parser.add_argument("--scales", type=scale, nargs="+", default=SCALES)
    parser.add_argument("--threshold", type=share, default=0.3, help="least confidence of a box")
    parser.add_argument("--overlap", type=share, default=0.3, help="IoU of boxes that are one word")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    options = parser.parse_args(arguments)
    model, recipe = load_model(options.checkpoint, usable(options.device))
    paths = pictures_of(options.pictures)
    check_out(options.out, paths)
    make_folder(options.out)

    skipped = []
    for path in tqdm(paths, "detect"):
        try:
            picture = read_picture(path)
            boxes = detect(
                model, recipe.grid(), picture, options.scales, options.threshold, options.overlap
            )
        except UserError as error:
            tqdm.write(f"skipped {path}: {error}", file=sys.stderr)
            skipped.append(path)
            continue
        drawn = Image.fromarray(draw_boxes(picture, boxes.quads, boxes.scores))
        drawn.save(options.out / f"{path.name}.png", pnginfo=_signature())
        write_json(as_json(boxes), options.out / f"{path.name}.json")
    print(f"{len(paths) - len(skipped)} of {len(paths)} pictures done, in {options.out}")
    if skipped:
        raise UserError(f"{len(skipped)} of {len(paths)} pictures were skipped")


if __name__ == "__main__":
    main()
