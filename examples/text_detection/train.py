"""Train the network and show what it learnt.

    python -m examples.text_detection.train                    # minutes on a laptop
    python -m examples.text_detection.train --resume           # go on after Ctrl-C
    torchrun --nproc-per-node 2 -m examples.text_detection.train

The output folder gets `log.csv`, `checkpoint.pt`, `detections.png`, `curves.png`, `score.json`,
and `tensorboard` where that is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from .arguments import natural, positive
from .batches import StepSampler, Stretched, load
from .draw import save_curves, save_detections
from .errors import UserError, exit_on_user_error
from .evaluate import HELD_OUT, HELD_OUT_SEED, detections, evaluate
from .files import make_folder, write_json
from .generator import GeneratedText
from .grid import Grid, warn_if_pixels
from .labelled import LabelledPictures, lost_words, require_one
from .log import Log, read_log
from .model import STRIDES, WIDTHS
from .processes import Processes, joined
from .scene import Scene
from .scoring import Score
from .training import Recipe, Training, check, read_checkpoint, save

_COLUMNS = (
    "loss",
    "coord",
    "positive_conf",
    "negative_conf",
    "num_positive",
    "collisions",
    "negative_weight",
    "learning_rate",
    "precision",
    "recall",
    "f_measure",
)
_DRAWN = 12  # held-out pictures on the sheet of detections


@dataclass(frozen=True)
class Run:
    """What a run does around its recipe, free to change when it is resumed."""

    out: Path = Path("runs/train")
    resume: bool = False
    device: str = "auto"
    workers: int = 1
    compile: bool = False
    log_every: int = 5
    score_every: int = 100
    save_every: int = 100


def train(recipe: Recipe, run: Run) -> Score | None:
    """Train by `recipe` into `run.out`; the final score, None if it was interrupted before."""
    started = time.monotonic()
    with joined(run.device) as processes:
        if recipe.batch % processes.count:
            raise UserError(
                f"--batch {recipe.batch} is not divisible by {processes.count} processes"
            )
        scenes, held_out = _scenes(recipe, processes)
        training = Training(recipe, processes, run.compile)
        checkpoint = run.out / "checkpoint.pt"
        if run.resume:
            state = read_checkpoint(checkpoint)
            training.load_state_dict(state)
            _check_length(scenes, held_out, state)
        elif processes.first:
            _set_aside(run.out)
            make_folder(run.out)
        if not _optimise(training, scenes, held_out, run):
            if processes.first:
                print(f"interrupted; {checkpoint} holds step {training.step}, --resume goes on")
            return None
        if not processes.first:
            return None
        score = _score_and_show(training, held_out, run)
        print(f"held-out pictures: {score}")
        print(f"figures in {run.out}; {time.monotonic() - started:.0f} s in all")
        return score


def _scenes(recipe: Recipe, processes: Processes) -> tuple[Dataset[Scene], Dataset[Scene]]:
    """The training scenes and the held-out ones, which share no picture."""
    if not recipe.data:
        return (
            GeneratedText(recipe.pictures, recipe.size, "train", recipe.seed),
            GeneratedText(recipe.held_out or HELD_OUT, recipe.size, "held-out", HELD_OUT_SEED),
        )
    scenes, grid = LabelledPictures(Path(recipe.data)), recipe.grid()
    kept = recipe.held_out or min(HELD_OUT, max(1, len(scenes) // 5))
    first = len(scenes) - kept
    if first < 1:
        raise UserError(
            f"{recipe.data} has {len(scenes)} pictures; with {kept} held out for scoring none is "
            "left to train on"
        )
    require_one(
        f"the {kept} held-out pictures", [scenes.path(i) for i in range(first, len(scenes))]
    )
    if processes.first:
        print(f"{first} pictures to train on, {kept} held out")
        if not recipe.crop:
            print(_lost_words(scenes, grid))
    held_out = Subset(scenes, range(first, len(scenes)))
    return Subset(scenes, range(first)), held_out if recipe.crop else Stretched(held_out, grid)


def _lost_words(scenes: LabelledPictures, grid: Grid) -> str:
    lost, words, pictures = lost_words(scenes, grid)
    return (
        f"{lost} of the {words} readable words of {pictures} pictures are lost to the input size: "
        f"less than {grid.min_height:g} pixels high at {grid.width} x {grid.height}"
        + (", where a larger --size, or --crop, would keep them" if lost else "")
    )


def _length(scenes: Dataset[Scene], held_out: Dataset[Scene]) -> int:
    return len(scenes) + len(held_out)  # type: ignore[arg-type]


def _check_length(scenes: Dataset[Scene], held_out: Dataset[Scene], state: dict[str, Any]) -> None:
    """UserError if pictures came or went: the split and the order of all would be others."""
    before, now = state.get("length"), _length(scenes, held_out)
    if before not in (None, now):
        raise UserError(
            f"the run began with {before} pictures, now there are {now}: bring the old ones back "
            "to go on, or leave --resume out to start anew"
        )


def _optimise(
    training: Training, scenes: Dataset[Scene], held_out: Dataset[Scene], run: Run
) -> bool:
    """Take the steps that are left, logging and saving; whether they were all taken."""
    recipe, processes = training.recipe, training.processes
    length = _length(scenes, held_out)
    log = None
    if processes.first:
        log = Log(run.out / "log.csv", _COLUMNS, training.step if run.resume else None)
    # A glance while training; the score that counts is of all held-out pictures at the end. Whole
    # pictures take longer than stretched ones.
    glance = 10 if recipe.crop else 50
    few = Subset(held_out, range(min(glance, len(held_out))))  # type: ignore[arg-type]
    first, last, seed = training.step, recipe.steps, recipe.seed
    steps = StepSampler(
        len(scenes),  # type: ignore[arg-type]
        recipe.batch,
        first,
        last,
        seed,
        processes.rank,
        processes.count,
    )
    bar = tqdm(
        load(scenes, recipe.grid(), steps, run.workers, seed if recipe.crop else None),
        "train",
        total=recipe.steps,
        initial=training.step,
        disable=not processes.first,
    )
    with bar, _ctrl_c() as pressed:
        for pictures, target, collisions in bar:
            if training.step == 0:
                warn_if_pixels(target.numpy())
            stats = training.advance(pictures, target)
            ends = training.step == last
            stop = processes.any(bool(pressed))
            if training.step % run.save_every == 0 or ends or stop:
                if processes.any(not training.finite()):
                    raise _diverged(training, run)
                if processes.first:
                    save({**training.state_dict(), "length": length}, run.out / "checkpoint.pt")
            scores = training.step % run.score_every == 0 or ends
            if training.step % run.log_every == 0 or scores:
                parts = training.parts(stats, len(pictures))
                if not math.isfinite(parts.loss):
                    raise _diverged(training, run)
                bar.set_postfix_str(
                    f"loss {parts.loss:.3f} = pose {parts.coord:.3f} + confidence "
                    f"{parts.positive_conf:.3f} (positive) + {parts.negative_conf:.3f} (negative)"
                )
                score = {}
                if log and scores:
                    score = _glance(training, few)
                if log:
                    log.add(
                        training.step,
                        **asdict(parts),
                        collisions=int(collisions.sum()),
                        negative_weight=training.negative_weight.get_last_weight(),
                        learning_rate=training.learning_rate.get_last_lr()[0],
                        **score,
                    )
            if stop and not ends:
                return False
    return True


def _glance(training: Training, scenes: Dataset[Scene]) -> dict[str, float]:
    """The ratios on a few pictures, for the log; none where not one of them can be read."""
    grid, scales = training.recipe.grid(), training.recipe.scales()
    try:
        return _ratios(evaluate(grid, detections(training.model, grid, scenes, scales)))
    except UserError as error:
        warnings.warn(f"no score at step {training.step}: {error}", stacklevel=2)
        return {}


def _diverged(training: Training, run: Run) -> UserError:
    """What to say when the loss or the weights are no longer finite."""
    checkpoint = run.out / "checkpoint.pt"
    kept = f"{checkpoint} holds an earlier step" if checkpoint.exists() else "nothing was saved"
    return UserError(
        f"the loss or the weights are no longer finite at step {training.step}: {kept}; train anew "
        "with a lower --learning-rate or a lower --clip"
    )


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising at once, so that a step is never left half done.

    A second Ctrl-C acts as usual.
    """
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _ratios(score: Score) -> dict[str, float]:
    return {
        "precision": score.precision,
        "recall": score.recall,
        "f_measure": score.f_measure,
    }


def _score_and_show(training: Training, held_out: Dataset[Scene], run: Run) -> Score:
    """The score of all held-out pictures; writes it and the two figures."""
    grid, scales = training.recipe.grid(), training.recipe.scales()
    found = detections(training.model, grid, held_out, scales, progress=True)
    drawn = list(itertools.islice(found, _DRAWN))
    score = evaluate(grid, itertools.chain(drawn, found))
    save_detections(drawn, run.out / "detections.png")
    log = read_log(run.out / "log.csv")
    if len(log["step"]):  # none if a resumed run found it damaged and had no step left
        title = f"held-out pictures: F-measure {score.f_measure:.3f}"
        save_curves(log, run.out / "curves.png", title)
    summary = {**_ratios(score), **asdict(score), "recipe": asdict(training.recipe)}
    write_json(summary, run.out / "score.json")
    return score


def _set_aside(out: Path) -> None:
    """Rename the folder of an earlier run, so that nothing it computed is lost."""
    if not (out / "checkpoint.pt").exists():
        return
    if not out.name:
        raise UserError(f"{out} has an earlier run; --resume it or name another --out")
    number = 1
    while (kept := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    out.rename(kept)
    print(f"the earlier run in {out} is now in {kept}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train",
        description="Train the text detector and show what it learnt.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    recipe, run = Recipe(), Run()
    add = parser.add_argument
    add("--out", type=Path, default=run.out, help="folder to write to")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    add("--data", default=recipe.data, help="SynthText, ICDAR or COCO; else generated")
    add("--crop", action="store_true", help="random windows of DATA's pictures, not stretched ones")
    add("--pictures", type=positive, default=recipe.pictures, help="generated to train on")
    add(
        "--held-out",
        type=positive,
        default=recipe.held_out,
        help="kept for scoring; without it 200, of DATA at most a fifth",
    )
    add("--size", type=positive, default=recipe.size, help="side of a picture in pixels")
    add("--stride", type=int, choices=STRIDES, default=recipe.stride, help="side of a cell")
    add("--width", choices=tuple(WIDTHS), default=recipe.width, help="channels of the network")
    add("--norm", choices=("batch", "group", "none"), default=recipe.norm, help="normalisation")
    add("--batch", type=positive, default=recipe.batch, help="pictures a step")
    add("--steps", type=positive, default=recipe.steps, help="steps in all")
    add("--learning-rate", type=float, default=recipe.learning_rate, help="the highest")
    add("--head-rate", type=float, default=recipe.head_rate, help="share of it for the head")
    add("--clip", type=float, default=recipe.clip, help="largest norm of the gradient")
    add("--decay", choices=("cosine", "paper"), default=recipe.decay, help="of the learning rate")
    add("--weight-decay", type=float, default=recipe.weight_decay, help="of SGD")
    add("--anneal", type=float, default=recipe.anneal, help="share of the steps till weight 1")
    add("--size-weight", type=float, default=recipe.size_weight, help="of w and h in the loss")
    add("--reduction", choices=("mean", "batchmean", "positive"), default=recipe.reduction)
    add("--seed", type=natural, default=recipe.seed, help="of pictures, order and weights")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="torch.compile the step")
    add("--device", default=run.device, help="cpu, cuda, or auto: a GPU if there is one")
    add("--workers", type=natural, default=run.workers, help="processes that make pictures")
    add("--log-every", type=positive, default=run.log_every, help="steps between rows of log.csv")
    add("--score-every", type=positive, default=run.score_every, help="steps between scores")
    add("--save-every", type=positive, default=run.save_every, help="steps between checkpoints")
    return parser


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(_parser().parse_args(arguments))
    recipe, run = (
        kind(**{field.name: options[field.name] for field in dataclasses.fields(kind)})
        for kind in (Recipe, Run)
    )
    check(recipe)
    train(recipe, run)


if __name__ == "__main__":
    main()
