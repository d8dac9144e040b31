"""Write generated pictures to disk in SynthText's format.

python -m examples.text_detection.make_data DIR --pictures 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .arguments import natural, positive
from .batches import load_scenes
from .errors import exit_on_user_error
from .generator import GeneratedText
from .synthtext import write_synthtext


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="make-data",
        description="Write generated pictures and their gt.mat, as SynthText has them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=positive, default=1000)
    parser.add_argument("--size", type=positive, default=256, help="side of a picture in pixels")
    parser.add_argument("--split", choices=("train", "held-out"), default="train")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--workers", type=natural, default=2, help="processes that draw")
    options = parser.parse_args(arguments)
    scenes = GeneratedText(options.pictures, options.size, options.split, options.seed)
    drawn = tqdm(load_scenes(scenes, options.workers), "make-data", total=len(scenes))
    write_synthtext(drawn, options.folder)
    print(f"{len(scenes)} pictures and gt.mat in {options.folder}")


if __name__ == "__main__":
    main()
