"""The question of 2017 (Keras issue 5087) answered: one network, four losses, one figure.

    python -m examples.text_detection keras-question

The same network sees the same pictures in the same order four times, with

    (a) the loss of the question, faithfully (`keras_snippet.py`), its weight annealed;
    (b) the right loss with the negative cells' weight at 1 throughout;
    (c) the right loss with the authors' schedule from 0.01 to 1;
    (d) as (c), with x, y, w and h in pixels of the picture instead of units of the grid.

All four are means over all elements, as Keras takes them. The optimiser sees each mean times one
constant, the same for all, which is only a learning rate. The output folder gets
`keras_question.png` and the numbers it is drawn from, `keras_question.csv`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from fcrn_fused import FCRNLoss

from .arguments import natural, positive
from .batches import CodedScenes, StepSampler, load
from .errors import exit_on_user_error
from .evaluate import HELD_OUT_SEED, detections, evaluate
from .files import make_folder
from .generator import GeneratedText
from .grid import Grid, warn_if_pixels
from .keras_snippet import keras_snippet_loss
from .model import FCRN
from .scene import Scene
from .training import Recipe, check, rate_schedule, sgd, weight_schedule

_WORDS = 4  # a picture has about this many; the factor on the mean is elements / words


@dataclass(frozen=True)
class Variant:
    """One of the four trainings.

    loss: of predictions, targets and the negative weight; 0-dim.
    annealed: whether the weight follows the schedule; else it is 1.
    pixels: whether the pose is in pixels.
    """

    title: str
    loss: Callable[[Tensor, Tensor, FCRNLoss], Tensor]
    annealed: bool = True
    pixels: bool = False


def _snippet(pred: Tensor, target: Tensor, loss: FCRNLoss) -> Tensor:
    return keras_snippet_loss(pred, target, loss.negative_weight).mean()


def _right(pred: Tensor, target: Tensor, loss: FCRNLoss) -> Tensor:
    return loss(pred, target)


VARIANTS = {
    "a": Variant("(a) the snippet of 2017", _snippet),
    "b": Variant("(b) right loss, weight 1", _right, annealed=False),
    "c": Variant("(c) right loss, annealed", _right),
    "d": Variant("(d) as (c), pose in pixels", _right, pixels=True),
}

COLUMNS = (
    "variant",
    "step",
    "negative_weight",
    "loss",
    "positive_confidence",
    "negative_confidence",
    "precision",
    "recall",
    "f_measure",
)
Row = dict[str, str | float]
Series = dict[str, NDArray[np.float64]]


class PixelPose(nn.Module):
    """Gives what a network says in pixels of the picture in units of the grid, and targets back.

    In pixels the pose of a cell is x, y, w, h of the word itself.
    """

    def __init__(self, model: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.model = model
        rows, columns = grid.height // grid.stride, grid.width // grid.stride
        scale = [grid.stride, grid.stride, grid.width, grid.height, 1, 1, 1]
        shift = torch.zeros(7, rows, columns)
        shift[0] = (torch.arange(columns) + 0.5) * grid.stride
        shift[1] = (torch.arange(rows)[:, None] + 0.5) * grid.stride
        self.register_buffer("scale", torch.tensor(scale).float()[:, None, None])
        self.register_buffer("shift", shift)

    def forward(self, pictures: Tensor) -> Tensor:
        """Predictions in units of the grid, for scoring."""
        return (self.model(pictures) - self.shift) / self.scale

    def target(self, target: Tensor) -> Tensor:
        """A target in pixels; negative cells stay 0."""
        return torch.where(target[:, 6:] > 0, target * self.scale + self.shift, target)


def train_variant(name: str, recipe: Recipe, pictures: int, every: int, workers: int) -> list[Row]:
    """Train one variant and measure it every `every` steps on `pictures` held-out pictures."""
    variant = VARIANTS[name]
    grid = recipe.grid()
    torch.manual_seed(recipe.seed)
    model = recipe.model()
    in_grid_units = PixelPose(model, grid) if variant.pixels else model
    loss = FCRNLoss()
    weight = weight_schedule(loss, recipe) if variant.annealed else None
    if weight is None:
        loss.negative_weight.fill_(1.0)
    optimiser = sgd(model, recipe)
    rate = rate_schedule(optimiser, recipe)
    factor = 7 * (recipe.size // recipe.stride) ** 2 / _WORDS

    scenes = GeneratedText(recipe.pictures, recipe.size, "train", recipe.seed)
    held_out = GeneratedText(pictures, recipe.size, "held-out", HELD_OUT_SEED)
    batches = load(
        scenes, grid, StepSampler(len(scenes), recipe.batch, 0, recipe.steps, recipe.seed), workers
    )
    rows: list[Row] = []
    for step, (inputs, target, _) in enumerate(tqdm(batches, variant.title), start=1):
        target = _without_ignored(target)
        if variant.pixels:
            target = in_grid_units.target(target)
            if step == 1:
                warn_if_pixels(target.numpy())
        model.train()
        error = variant.loss(model(inputs), target, loss)
        optimiser.zero_grad()
        (factor * error).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        rate.step()
        current = loss.negative_weight.item()
        if weight is not None:
            weight.step()
        if step % every == 0 or step in (1, recipe.steps):
            positive, negative = mean_confidence(model, grid, held_out)
            score = evaluate(grid, detections(in_grid_units, grid, held_out))
            values = (
                error.item(),
                positive,
                negative,
                score.precision,
                score.recall,
                score.f_measure,
            )
            rows.append(dict(zip(COLUMNS, (name, step, current, *values), strict=True)))
    return rows


def _without_ignored(target: Tensor) -> Tensor:
    """The snippet knows no ignored cells: to all four losses they are negative."""
    target[:, 6].clamp_(min=0)
    return target


@torch.inference_mode()
def mean_confidence(model: FCRN, grid: Grid, scenes: Dataset[Scene]) -> tuple[float, float]:
    """The mean predicted confidence of positive and of negative cells."""
    model.eval()
    coded = CodedScenes(scenes, grid)
    sums, counts = np.zeros(2), np.zeros(2)
    for index in range(len(coded)):
        picture, target, _ = coded[index]
        confidence = model(picture[None])[0, 6]
        for kind, cells in enumerate((target[6] > 0, target[6] == 0)):
            sums[kind] += confidence[cells].sum().item()
            counts[kind] += cells.sum().item()
    positive, negative = sums / counts
    return float(positive), float(negative)


def draw(rows: Sequence[Row], path: Path) -> None:
    """The figure: confidences, loss and F-measure of every variant over the steps."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(3, len(VARIANTS), sharex=True, sharey="row")
    for column, (name, variant) in enumerate(VARIANTS.items()):
        own = [row for row in rows if row["variant"] == name]
        series = {
            key: np.array([float(row[key]) for row in own]) for key in COLUMNS if key != "variant"
        }
        confidence, loss, score = axes[:, column]
        _curve(confidence, series, "positive_confidence", "positive cells", "tab:green")
        _curve(confidence, series, "negative_confidence", "negative cells", "tab:red")
        _curve(confidence, series, "negative_weight", "negative weight", "0.6", linestyle="--")
        confidence.set(title=variant.title, ylim=(-0.2, 1.3))
        _curve(loss, series, "loss", "loss", "tab:blue")
        loss.set(yscale="log")
        _curve(score, series, "f_measure", "F-measure", "black")
        score.set(ylim=(0, 1), xlabel="step")
    axes[0, 0].set_ylabel("mean confidence, held-out")
    axes[0, 0].legend(fontsize="small")
    axes[1, 0].set_ylabel("loss (mean), training")
    axes[2, 0].set_ylabel("F-measure, held-out")
    figure.savefig(path, dpi=80)


def _curve(axes: Axes, series: Series, key: str, label: str, color: str, **style: str) -> None:
    axes.plot(series["step"], series[key], label=label, color=color, lw=1.2, **style)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        prog="keras-question",
        description="Train one network with four losses and draw what becomes of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/keras_question"))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=positive, default=recipe.steps)
    parser.add_argument(
        "--size", type=positive, default=recipe.size, help="side of a picture in pixels"
    )
    parser.add_argument("--pictures", type=positive, default=50, help="held-out pictures")
    parser.add_argument("--every", type=positive, default=50, help="steps between measurements")
    parser.add_argument("--workers", type=natural, default=1, help="processes that make pictures")
    parser.add_argument("--seed", type=natural, default=recipe.seed)
    options = parser.parse_args(arguments)
    recipe = dataclasses.replace(recipe, steps=options.steps, size=options.size, seed=options.seed)
    check(recipe)
    make_folder(options.out)
    rows: list[Row] = []
    for name in options.variants:
        rows += train_variant(name, recipe, options.pictures, options.every, options.workers)
        with (options.out / "keras_question.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, options.out / "keras_question.png")
        last = rows[-1]
        print(
            f"{VARIANTS[name].title}: loss {last['loss']:.4g}, confidence "
            f"{last['positive_confidence']:.3f} on positive and {last['negative_confidence']:.3f} "
            f"on negative cells, F-measure {last['f_measure']:.3f}"
        )
    print(f"keras_question.png and .csv in {options.out}")


if __name__ == "__main__":
    main()
