"""Score a trained network on labelled pictures: precision, recall and F-measure.

python -m examples.text_detection.evaluate runs/train/checkpoint.pt
python -m examples.text_detection.evaluate runs/train/checkpoint.pt --data DATA

A network is scored on pictures as it was trained: stretched to its size, or, after a training on
crops, whole.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from .arguments import positive, scale, share
from .batches import Stretched
from .detection import detect
from .errors import UserError, exit_on_user_error
from .generator import GeneratedText
from .grid import Boxes, Grid
from .labelled import LabelledPictures
from .processes import usable
from .scene import Scene
from .scoring import Score, score
from .training import load_model

HELD_OUT = 200  # pictures kept for scoring, unless another number is asked for
HELD_OUT_SEED = 1_000_003  # of the generated held-out pictures, which every score here is of


def detections(
    model: nn.Module,
    grid: Grid,
    scenes: Dataset[Scene],
    scales: Sequence[float] = (1.0,),
    threshold: float = 0.3,
    progress: bool = False,
) -> Iterator[tuple[Scene, Boxes]]:
    """The scenes in order with what `model` finds; leaves it in eval mode.

    A scene whose picture cannot be read is warned about and left out.
    """
    model.eval()
    count = len(scenes)  # type: ignore[arg-type]
    for index in tqdm(range(count), "evaluate", disable=not progress, leave=False):
        try:
            scene = scenes[index]
            yield scene, detect(model, grid, scene.picture, scales, threshold)
        except UserError as error:
            warnings.warn(f"scene {index} is left out: {error}", stacklevel=2)


def evaluate(grid: Grid, found: Iterable[tuple[Scene, Boxes]]) -> Score:
    """The score of what `detections` found; UserError if it is of no picture."""
    scores = [score(boxes, scene.quads, grid.wanted(scene)) for scene, boxes in found]
    if not scores:
        raise UserError("none of the pictures could be scored")
    return sum(scores, Score())


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="evaluate", description="Precision, recall and F-measure of a trained network."
    )
    parser.add_argument("checkpoint", type=Path, help="what `train` wrote")
    parser.add_argument("--data", type=Path, help="SynthText, ICDAR or COCO; else generated")
    parser.add_argument(
        "--pictures", type=positive, help=f"at most; without it all, or {HELD_OUT} generated"
    )
    parser.add_argument("--scales", type=scale, nargs="+", help="1, or the paper's after --crop")
    parser.add_argument("--threshold", type=share, default=0.3, help="least confidence of a box")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    options = parser.parse_args(arguments)
    model, recipe = load_model(options.checkpoint, usable(options.device))
    grid, scales = recipe.grid(), options.scales or recipe.scales()
    scenes: Dataset[Scene]
    if options.data:
        scenes = LabelledPictures(options.data, length=options.pictures)
        scenes = scenes if recipe.crop else Stretched(scenes, grid)
    else:
        scenes = GeneratedText(options.pictures or HELD_OUT, grid.width, "held-out", HELD_OUT_SEED)
    found = detections(model, grid, scenes, scales, options.threshold, progress=True)
    print(evaluate(grid, found))


if __name__ == "__main__":
    main()
