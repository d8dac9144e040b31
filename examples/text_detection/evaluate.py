"""Score a trained network on labelled pictures: precision, recall and F-measure.

python -m examples.text_detection.evaluate runs/train/checkpoint.pt
python -m examples.text_detection.evaluate runs/train/checkpoint.pt --data SYNTHTEXT
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from .arguments import positive
from .detection import detect
from .errors import UserError, exit_on_user_error
from .generator import GeneratedText
from .grid import Grid
from .processes import usable
from .scene import Scene
from .scoring import Score, score
from .synthtext import SynthText
from .training import load_model

HELD_OUT_SEED = 1_000_003  # of the generated held-out pictures, which every score here is of


def readable(scenes: Dataset[Scene]) -> Iterator[Scene]:
    """The scenes in order; one whose picture cannot be read is warned about and left out."""
    for index in range(len(scenes)):  # type: ignore[arg-type]
        try:
            yield scenes[index]
        except UserError as error:
            warnings.warn(f"scene {index} is left out: {error}", stacklevel=2)


def evaluate(
    model: nn.Module,
    grid: Grid,
    scenes: Dataset[Scene],
    scales: Sequence[float] = (1.0,),
    threshold: float = 0.3,
    progress: bool = False,
) -> Score:
    """The score of `model` on all `scenes`; leaves the model in eval mode."""
    model.eval()
    total = Score()
    count = len(scenes)  # type: ignore[arg-type]
    for scene in tqdm(readable(scenes), "evaluate", count, disable=not progress, leave=False):
        found = detect(model, grid, scene.picture, scales, threshold)
        height, width = scene.picture.shape[:2]
        total += score(found, scene.quads, grid.readable(scene.quads, width, height))
    return total


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="evaluate", description="Precision, recall and F-measure of a trained network."
    )
    parser.add_argument("checkpoint", type=Path, help="what `train` wrote")
    parser.add_argument("--data", type=Path, help="a folder in SynthText's format; else generated")
    parser.add_argument("--pictures", type=positive, default=200, help="how many, at most")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--threshold", type=float, default=0.3, help="least confidence of a box")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    options = parser.parse_args(arguments)
    model, grid = load_model(options.checkpoint, usable(options.device))
    scenes: Dataset[Scene]
    if options.data:
        scenes = SynthText(options.data, length=options.pictures)
    else:
        scenes = GeneratedText(options.pictures, grid.width, "held-out", HELD_OUT_SEED)
    print(evaluate(model, grid, scenes, options.scales, options.threshold, progress=True))


if __name__ == "__main__":
    main()
