"""One training process or several, started by `torchrun`, through torch.distributed alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among `count`, and the device it computes on."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the terminal."""
        return self.rank == 0

    def share(self, model: nn.Module) -> nn.Module:
        """`model`, wrapped so that gradients are averaged over the processes.

        On GPUs batch normalisation is made to see the whole batch. PyTorch has no such layer for
        CPUs: there every process normalises with its own part, so only "group" and "none" give
        the same result as one process.
        """
        if self.count == 1:
            return model
        if self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            return DistributedDataParallel(model, device_ids=[self.device.index])
        return DistributedDataParallel(model)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`, a new tensor; collective."""
        total = values.detach().clone()
        if self.count > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in at least one process; collective."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))


def usable(device: str) -> torch.device:
    """The device by name, "auto" being a GPU if there is one; UserError if there is no such."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except Exception as error:  # PyTorch raises many kinds for a device that is not there
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return chosen


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that `torchrun` started, if it did: gloo on CPUs, NCCL on GPUs."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = usable(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
        torch.cuda.set_device(chosen)
    if count == 1:
        yield Processes(rank, count, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, chosen)
        dist.barrier()  # nobody leaves while the first process still scores and draws
    finally:
        dist.destroy_process_group()
