"""One step of training, and everything a run must remember to go on as if never interrupted."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fcrn_fused import FCRNLoss, FCRNLossStats, StepNegativeWeight

from .detection import SCALES
from .errors import UserError
from .files import replace_file
from .grid import IGNORE, Grid
from .model import FCRN, Norm
from .processes import Processes

_GAMMA = 1.05  # growth of the negative weight, from 0.01, as the paper's authors have it
_GROWTHS = math.ceil(math.log(100) / math.log(_GAMMA))  # 95 growths lead from 0.01 to 1


@dataclass(frozen=True)
class Recipe:
    """What decides the result of a run; a run goes on only with the recipe it began with.

    data: a data set that `LabelledPictures` reads, "" for generated pictures.
    pictures: number of generated training pictures; more than are seen means none comes twice.
    held_out: pictures kept for scoring; None is 200, and of `data` at most a fifth.
    size: width and height of the training pictures, in pixels.
    crop: train on random windows of the pictures of `data`; else they are stretched to `size`.
    batch: pictures a step, of all processes together.
    learning_rate: the highest; it rises over the first twentieth of the steps and, with
        `decay` "cosine", falls to a hundredth by the end; with "paper" it falls to a tenth in
        the second half.
    head_rate: learning rate of the last convolution, as a share of the others'. Its inputs are
        many and alike, so the loss is steep along a few directions of its weights; the layers
        before it are normalised and stand a far higher rate.
    clip: a gradient of a larger norm is cut back to it.
    anneal: share of the steps over which the weight of negative cells rises from 0.01 to 1.
    size_weight: what the loss pays for w and h more than for x and y. A pixel of x is 1 / stride
        and a pixel of w is 1 / W, so (W / stride)^2 would make all pixels cost the same.
    reduction: of the loss, "mean", "batchmean" or "positive".
    amp: bfloat16 autocast.
    """

    data: str = ""
    pictures: int = 100_000
    held_out: int | None = None
    size: int = 256
    crop: bool = False
    stride: int = 16
    width: str = "narrow"
    norm: Norm = "batch"
    batch: int = 16
    steps: int = 500
    learning_rate: float = 1.0
    decay: str = "cosine"
    head_rate: float = 0.001
    clip: float = 1.0
    weight_decay: float = 5e-4
    anneal: float = 0.8
    size_weight: float = 4.0
    reduction: str = "positive"
    amp: bool = False
    seed: int = 0

    def grid(self) -> Grid:
        return Grid(self.stride, self.size, self.size)

    def model(self) -> FCRN:
        return FCRN(self.width, self.stride, self.norm)

    def scales(self) -> tuple[float, ...]:
        """At which held-out pictures are looked at; whole ones hold words of all sizes."""
        return SCALES if self.crop else (1.0,)


def check(recipe: Recipe) -> None:
    """UserError for values that argparse lets through and no run can use."""
    if recipe.size % recipe.stride:
        raise UserError(f"--size {recipe.size} is no multiple of --stride {recipe.stride}")
    if recipe.crop and not recipe.data:
        raise UserError("--crop needs --data: generated pictures have the size that is asked for")
    for name in ("learning_rate", "head_rate", "size_weight", "clip"):
        value = getattr(recipe, name)
        if not value > 0 or (value == math.inf and name != "clip"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if not recipe.weight_decay >= 0:
        raise UserError(f"--weight-decay must be at least 0, not {recipe.weight_decay}")
    if not 0 < recipe.anneal <= 1:
        raise UserError(f"--anneal must be above 0 and at most 1, not {recipe.anneal}")


@dataclass(frozen=True)
class Parts:
    """A step's loss and what it is made of, all divided as the reduction divides."""

    loss: float
    coord: float
    positive_conf: float
    negative_conf: float
    num_positive: int


class Training:
    """Model, loss, optimiser and the two schedules, stepped and saved together."""

    def __init__(self, recipe: Recipe, processes: Processes, compiled: bool = False) -> None:
        self.recipe = recipe
        self.processes = processes
        self.step = 0
        torch.manual_seed(recipe.seed)
        self.model = recipe.model().to(processes.device)
        self.shared = processes.share(self.model)
        # A sum can be divided by the number of positive cells of all processes; see `_divided`.
        summed = recipe.reduction == "positive" and processes.count > 1
        self.loss = FCRNLoss(
            coord_weight=(1.0, 1.0, recipe.size_weight, recipe.size_weight, 1.0, 1.0),
            ignore_value=IGNORE,
            reduction="sum" if summed else recipe.reduction,
            return_stats=True,
        ).to(processes.device)
        self.optimiser = sgd(self.model, recipe)
        self.learning_rate = rate_schedule(self.optimiser, recipe)
        self.negative_weight = weight_schedule(self.loss, recipe)
        self._forward = self._predict_and_lose
        if compiled:
            self._forward = torch.compile(self._predict_and_lose)

    def advance(self, pictures: Tensor, target: Tensor) -> FCRNLossStats:
        """Take one step on this process's part of the batch; the sums of the loss's parts.

        pictures: (B, 3, H, W) uint8; target: (B, 7, H / stride, W / stride).
        """
        device = self.processes.device
        pictures = pictures.to(device, non_blocking=True)
        target = target.to(device, non_blocking=True)
        self.shared.train()
        loss, stats = self._forward(pictures, target)
        self.optimiser.zero_grad(set_to_none=True)
        self._divided(loss, stats).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimiser.step()
        self.learning_rate.step()
        self.negative_weight.step()
        self.step += 1
        return stats

    def parts(self, stats: FCRNLossStats, pictures: int) -> Parts:
        """The parts of the whole batch's loss from this process's sums; collective.

        pictures: how many this process's part of the batch had.
        """
        sums = torch.stack([value.double() for value in stats])
        coord, positive, negative, count = self.processes.sum(sums).tolist()
        pictures *= self.processes.count
        cells = (self.recipe.size // self.recipe.stride) ** 2
        divisor = {
            "mean": pictures * 7 * cells,
            "batchmean": pictures,
            "positive": max(1.0, count),
        }[self.recipe.reduction]
        shares = coord / divisor, positive / divisor, negative / divisor
        return Parts(sum(shares), *shares, int(count))

    def finite(self) -> bool:
        """Whether all numbers of the model and of the optimiser are finite."""
        momenta = (state["momentum_buffer"] for state in self.optimiser.state.values())
        tensors = itertools.chain(self.model.state_dict().values(), momenta)
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs; tensors and plain values only."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "negative_weight": self.negative_weight.state_dict(),
            "random": torch.get_rng_state(),
        }
        if self.processes.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.processes.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; UserError if it is of another recipe."""
        saved_recipe = asdict(_recipe(state))
        for name, value in asdict(self.recipe).items():
            if saved_recipe[name] != value:
                saved, asked = _as_flag(name, saved_recipe[name]), _as_flag(name, value)
                raise UserError(
                    f"the checkpoint was made {saved}, this run is {asked}: run it {saved} to go "
                    "on, or leave --resume out to start anew"
                )
        self.step = state["step"]
        _load(self.model, state)
        self.optimiser.load_state_dict(state["optimiser"])
        self.learning_rate.load_state_dict(state["learning_rate"])
        self.negative_weight.load_state_dict(state["negative_weight"])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state and self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.processes.device)

    def _predict_and_lose(self, pictures: Tensor, target: Tensor) -> tuple[Tensor, FCRNLossStats]:
        device_type = self.processes.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.recipe.amp):
            return self.loss(self.shared(pictures), target)

    def _divided(self, loss: Tensor, stats: FCRNLossStats) -> Tensor:
        """The loss whose gradient, averaged over the processes, is that of the whole batch.

        DistributedDataParallel averages gradients over K processes. With "mean" and "batchmean"
        every process divides by the same number, so the average is right as it is. With
        "positive" it is not: each process would divide by its own number of positive cells. The
        recipe: take reduction="sum", add up the number of positive cells N over the processes,
        and scale by K / N, so that the average of the K gradients is that of sum / N.
        """
        if self.recipe.reduction != "positive" or self.processes.count == 1:
            return loss
        positives = self.processes.sum(stats.num_positive).clamp(min=1)
        return loss * (self.processes.count / positives)


def sgd(model: FCRN, recipe: Recipe) -> torch.optim.SGD:
    """SGD with momentum 0.9 and a rate of its own for the head."""
    rate = recipe.learning_rate
    groups = [
        {"params": model.features.parameters()},
        {"params": model.head.parameters(), "lr": rate * recipe.head_rate},
    ]
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=recipe.weight_decay)


def rate_schedule(optimiser: torch.optim.SGD, recipe: Recipe) -> LambdaLR:
    """The learning rate step by step, as `Recipe` tells."""
    steps = recipe.steps
    warm_up = max(1, steps // 20)

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        if recipe.decay == "paper":
            return 1.0 if step < steps // 2 else 0.1
        progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimiser, share)


def weight_schedule(loss: FCRNLoss, recipe: Recipe) -> StepNegativeWeight:
    """The authors' schedule, its steps scaled to the length of the run."""
    step_size = max(1, round(recipe.anneal * recipe.steps / _GROWTHS))
    return StepNegativeWeight(loss, gamma=_GAMMA, step_size=step_size)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` always holds a whole one, the old or the new."""
    contents = io.BytesIO()
    torch.save(state, contents)
    replace_file(path, contents.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save` wrote; UserError where there is no such file or it is something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; `train` writes one") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # torch.load raises many kinds, and advises to switch its safety off
        state = None
    is_checkpoint = isinstance(state, dict) and {"recipe", "step", "model"} <= state.keys()
    if not is_checkpoint or not isinstance(state["recipe"], dict):
        raise UserError(f"{path} is not a checkpoint that `train` wrote, or it is damaged")
    return state


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Recipe]:
    """The trained network of a checkpoint, in eval mode, and the recipe of its run."""
    state = read_checkpoint(path)
    recipe = _recipe(state)
    model = recipe.model()
    _load(model, state)
    return model.to(device).eval(), recipe


def _load(model: FCRN, state: dict[str, Any]) -> None:
    """Load the weights of a checkpoint; UserError if they are of another network."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the checkpoint is of another version's network: {reason}") from None


def _as_flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    if value in (None, False, ""):
        return f"without {flag}"
    return f"with {flag}" if value is True else f"with {flag} {value}"


def _recipe(state: dict[str, Any]) -> Recipe:
    """The recipe in a checkpoint; what it does not name has the default."""
    known = {field.name for field in fields(Recipe)}
    if unknown := sorted(state["recipe"].keys() - known):
        raise UserError(f"the checkpoint is of another version: it has {', '.join(unknown)}")
    return Recipe(**state["recipe"])
