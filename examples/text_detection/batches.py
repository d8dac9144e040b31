"""Scenes to batches, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import UserError
from .grid import IGNORE, Grid
from .scene import Scene

Batch = tuple[Tensor, Tensor, Tensor]
"""pictures (B, 3, H, W) uint8, target (B, 7, H / stride, W / stride) float32, collisions (B,)."""


class Stretched(Dataset[Scene]):
    """The scenes of a data set, stretched to the training size of a grid."""

    def __init__(self, scenes: Dataset[Scene], grid: Grid) -> None:
        self.scenes = scenes
        self.grid = grid

    def __len__(self) -> int:
        return len(self.scenes)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Scene:
        return self.scenes[index].resized(self.grid.width, self.grid.height)


class CodedScenes(Dataset[Batch]):
    """The scenes of a data set at the grid's training size, coded.

    crops: None stretches the pictures; a number is the seed of random crops of them.

    A key goes on counting where a `StepSampler` begins a new epoch: key % length is the scene, and
    the key decides on the crop. A scene whose picture cannot be read is warned about and has only
    ignored cells.
    """

    def __init__(self, scenes: Dataset[Scene], grid: Grid, crops: int | None = None) -> None:
        self.scenes = scenes
        self.grid = grid
        self.crops = crops

    def __len__(self) -> int:
        return len(self.scenes)  # type: ignore[arg-type]

    def __getitem__(self, key: int) -> Batch:
        width, height = self.grid.width, self.grid.height
        try:
            scene = self.scenes[key % len(self)]
        except UserError as error:
            # One spoilt file must not end a long run: all its cells are ignored.
            warnings.warn(f"scene {key % len(self)} is ignored: {error}", stacklevel=1)
            return self._nothing()
        if self.crops is not None:
            scene = random_crop(scene, width, np.random.default_rng([self.crops, key]))
        scene = scene.resized(width, height)
        coded = self.grid.encode(scene.quads, width, height, scene.legible)
        return (
            torch.from_numpy(scene.picture).permute(2, 0, 1),
            torch.from_numpy(coded.target),
            torch.tensor(coded.collisions),
        )

    def _nothing(self) -> Batch:
        width, height, stride = self.grid.width, self.grid.height, self.grid.stride
        target = torch.zeros(7, height // stride, width // stride)
        target[6] = IGNORE
        return torch.zeros(3, height, width, dtype=torch.uint8), target, torch.tensor(0)


def random_crop(scene: Scene, least: int, random: np.random.Generator) -> Scene:
    """A square window with a side from `least` pixels to the longer side of the picture.

    It is at most twice the shorter side: little of a larger one would be picture. So small and
    large words come at many sizes, and keep their shape. Half of the windows hold the middle of a
    word, for most of a large picture has none.
    """
    height, width = scene.picture.shape[:2]
    most = max(least, min(max(width, height), 2 * min(width, height)))
    side = round(np.exp(random.uniform(*np.log([least, most]))))
    # Where the window is the larger, the picture lies anywhere in it.
    low = np.minimum(0, [width - side, height - side])
    high = np.maximum(0, [width - side, height - side])
    quads = scene.quads[scene.legible]
    if len(quads) and random.random() < 0.5:
        middle = quads[random.integers(len(quads))].mean(axis=0).clip(0, [width, height])
        low = np.maximum(low, np.ceil(middle - side)).astype(int)
        high = np.minimum(high, np.floor(middle)).astype(int)
    left, top = random.integers(low, high + 1)
    return scene.cropped(left, top, side)


class StepSampler(Sampler[list[int]]):
    """The keys of each step's batch, from step `first` to step `last` (exclusive).

    Every epoch is a permutation of 0 ... length - 1 drawn from the seed and the epoch's number,
    plus `length` for each epoch before; a batch may reach over into the next epoch. Nothing is
    remembered between steps, so a run that is taken up at step n sees what it would have seen.
    With `count` processes, process `rank` gets every count-th key of the batch: together they see
    the batch of a single one.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        first: int,
        last: int,
        seed: int = 0,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        self.length = length
        self.batch = batch
        self.first = first
        self.last = last
        self.seed = seed
        self.rank = rank
        self.count = count

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, int)
        for step in range(self.first, self.last):
            keys = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                keys.append(epoch * self.length + int(order[position % self.length]))
            yield keys[self.rank :: self.count]


def load(
    scenes: Dataset[Scene],
    grid: Grid,
    steps: Sampler[list[int]] | Sequence[list[int]],
    workers: int,
    crops: int | None = None,
) -> DataLoader[Batch]:
    """The batches whose keys `steps` names, made by `workers` processes beside this one."""
    return DataLoader(
        CodedScenes(scenes, grid, crops),
        batch_sampler=steps,
        num_workers=workers,
        worker_init_fn=_start_worker,
        # Without one of its own, the loader would draw from the generator that a resume restores.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )


def load_scenes(scenes: Dataset[Scene], workers: int) -> DataLoader[Scene]:
    """All scenes in order, made by `workers` processes beside this one."""
    return DataLoader(
        scenes, batch_size=None, num_workers=workers, worker_init_fn=_start_worker, collate_fn=_same
    )


def _same(scene: Scene) -> Scene:
    return scene  # the default would make tensors of the arrays


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the training process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
