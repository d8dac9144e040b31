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
    """The scenes of a data set, stretched to the grid's training size and coded.

    A scene whose picture cannot be read is warned about and has only ignored cells.
    """

    def __init__(self, scenes: Dataset[Scene], grid: Grid) -> None:
        self.scenes = Stretched(scenes, grid)
        self.grid = grid

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Batch:
        try:
            scene = self.scenes[index]
        except UserError as error:
            # One spoilt file must not end a long run: all its cells are ignored.
            warnings.warn(f"scene {index} counts for nothing: {error}", stacklevel=1)
            return self._nothing()
        coded = self.grid.encode(scene.quads, self.grid.width, self.grid.height)
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


class StepSampler(Sampler[list[int]]):
    """The indices of each step's batch, from step `first` to step `last` (exclusive).

    Every epoch is a permutation of 0 ... length - 1 drawn from the seed and the epoch's number; a
    batch may reach over into the next epoch. Nothing is remembered between steps, so a run that
    is taken up at step n sees what it would have seen. With `count` processes, process `rank`
    gets every count-th index of the batch: together they see the batch of a single one.
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
            indices = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                indices.append(int(order[position % self.length]))
            yield indices[self.rank :: self.count]


def load(
    scenes: Dataset[Scene],
    grid: Grid,
    steps: Sampler[list[int]] | Sequence[list[int]],
    workers: int,
) -> DataLoader[Batch]:
    """The batches whose indices `steps` names, made by `workers` processes beside this one."""
    return DataLoader(
        CodedScenes(scenes, grid),
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
