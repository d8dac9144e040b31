"""One pass of the loss for `run_pass`: what csrc/loss_op.h would make of tensors, as a file."""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_on_host import build
from torch import Tensor

_VIEWS = ("pred", "target", "errors", "grad", "grad_output", "weight", "positive")
_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.bool: "bool",
}


class Schedule(NamedTuple):
    order: str = "forward"
    seed: int = 0
    resident_blocks: int = 1


SCHEDULES = (
    Schedule("forward"),
    Schedule("backward"),
    Schedule("shuffled", 1, 3),
)


class Layout(NamedTuple):
    """How the elements of a (B, C, *S) tensor lie in memory."""

    name: str = "contiguous"  # or channels_last, transposed, sliced, padded, expanded
    misaligned_by: int = 0  # elements between the allocation's start and the tensor's

    def __str__(self) -> str:
        return self.name + (f"+{self.misaligned_by}" if self.misaligned_by else "")

    def strides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Strides in elements; every layout but `expanded` gives each element its own place."""
        dims = list(range(len(shape)))
        padding = 0
        match self.name:
            case "contiguous" | "expanded" | "padded":
                order = dims
            case "channels_last":
                order = [0, *dims[2:], 1]
            case "transposed":  # the spatial dimensions, the last outermost
                order = [0, 1, *reversed(dims[2:])]
            case "sliced":  # a window of a wider map
                order, padding = dims, 3
            case _:
                raise ValueError(self.name)
        strides = [0] * len(shape)
        stride = 1
        for dim in reversed(order):
            strides[dim] = stride
            stride *= max(1, shape[dim]) + (padding if dim == dims[-1] else 0)
        if self.name == "expanded":
            strides[0] = 0
        if self.name == "padded":  # one element after each image
            strides[0] += 1
        return tuple(strides)


CONTIGUOUS = Layout()


def placed(values: Tensor, layout: Layout) -> Tensor:
    """The values in a storage of their own, with the strides of `layout` and NaN in its gaps."""
    strides = layout.strides(values.shape)
    storage = torch.full((_extent(values.shape, strides),), math.nan, dtype=values.dtype)
    result = storage.as_strided(values.shape, strides)
    each_once(result).copy_(values[:1] if 0 in strides else values)
    return result


def each_once(tensor: Tensor) -> Tensor:
    """The tensor without the dimensions along which it repeats itself."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@dataclass
class _Buffer:
    name: str
    dtype: torch.dtype
    elements: int
    misaligned_by: int  # bytes
    pieces: list[tuple[int, Tensor]]  # first element and what is there; 1-D
    written: bool
    spread: bool = False  # so large that only its pieces are in memory and in the results


class _Dim(NamedTuple):
    """One or several dimensions of the tensors, as one of the grid, and each view's stride."""

    size: int
    strides: dict[str, int]

    def joined(self, inner: _Dim, but: str = "") -> _Dim | None:
        """With the dimension inside it as one, if they lie so in all views, `but` one perhaps."""
        strides = inner.strides.copy()
        for name, stride in self.strides.items():
            if name == but:
                strides[name] = stride
            elif stride != inner.size * inner.strides[name]:
                return None
        return _Dim(self.size * inner.size, strides)


class Grid(NamedTuple):
    """Tensors taken apart as GridBuilder (csrc/loss_op.h) does it."""

    images: _Dim
    maps: _Dim
    cells: list[_Dim]
    weight_repeat: int

    @property
    def num_cells(self) -> int:
        """Those of one image."""
        return math.prod(dim.size for dim in self.cells)


@dataclass
class Pass:
    """The description of a pass, in the terms of LossPass (csrc/loss_pass.h)."""

    shape: tuple[int, ...]  # (B, C, *S); without kinds any
    has_kinds: bool = True
    output: int = 0
    divisor: int = 1
    negative_weight: float | Tensor = 1.0
    positive_weight: float = 1.0
    coord_weight: float | Sequence[float] | Tensor = 1.0
    ignore_value: float | None = None  # rounded to the dtype of target
    wrt_target: bool = False
    grad_is_for_one: bool = False
    resident_blocks: int = 16
    wide_index: bool = False  # 64 bits, though 32 would do
    buffers: dict[str, _Buffer] = field(default_factory=dict)
    views: dict[str, tuple[tuple[int, ...], bool]] = field(default_factory=dict)
    never_read: list[tuple[str, int, int]] = field(default_factory=list)

    def read(self, name: str, tensor: Tensor, misaligned_by: int = 0, *, written: bool = False):
        """A tensor that the pass reads; with `written`, and changes in place.

        What lies in the gaps between its elements may be read by no one.
        """
        extent = _extent(tensor.shape, tensor.stride())
        content = tensor.as_strided((extent,), (1,), tensor.storage_offset())
        offset = misaligned_by * tensor.element_size()
        self.buffers[name] = _Buffer(
            name, tensor.dtype, extent, offset, [(0, content)] if extent else [], written
        )
        if tensor.dim() >= 1 and name in _VIEWS:
            self.views[name] = (tensor.stride(), tensor.dim() < len(self.shape))
            used = torch.zeros(extent, dtype=torch.bool)
            each_once(used.as_strided(tensor.shape, tensor.stride())).fill_(True)
            self.forbid(name, ~used)

    def forbid(self, name: str, elements: Tensor) -> None:
        """Elements of a buffer, by a 1-D mask over its storage, that no thread may read."""
        size = self.buffers[name].dtype.itemsize
        edges = torch.diff(elements.to(torch.int8), prepend=torch.zeros(1), append=torch.zeros(1))
        begins, ends = (edges > 0).nonzero()[:, 0], (edges < 0).nonzero()[:, 0]
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            self.never_read.append((name, begin * size, end * size))

    def write(
        self, name: str, dtype: torch.dtype, layout: Layout | None = None, *, per_cell: bool = False
    ):
        """A tensor that the pass writes; without a layout, a scalar."""
        if layout is None:
            self.buffers[name] = _Buffer(name, dtype, 1, 0, [], True)
            return
        shape = (self.shape[0], *self.shape[2:]) if per_cell else self.shape
        strides = layout.strides(shape)
        offset = layout.misaligned_by * torch.finfo(dtype).bits // 8
        extent = _extent(shape, strides)
        self.buffers[name] = _Buffer(name, dtype, extent, offset, [], True)
        self.views[name] = (strides, per_cell)

    def spread(self, name: str, *strides: int) -> None:
        """Move the rows of a contiguous (B, C, *S) tensor to strides that take gigabytes.

        `strides` are those of all dimensions but the last.
        """
        buffer = self.buffers[name]
        *outer, cells = self.shape
        places = torch.zeros(outer, dtype=torch.int64)
        for dim, stride in enumerate(strides):
            along = [1] * len(outer)
            along[dim] = outer[dim]
            places += torch.arange(outer[dim]).reshape(along) * stride
        rows = torch.full((places.numel(), cells * buffer.dtype.itemsize), 0xFF, dtype=torch.uint8)
        if buffer.pieces:
            rows = buffer.pieces[0][1].reshape(places.numel(), cells).view(torch.uint8)
        buffer.pieces = [
            (place, row.view(buffer.dtype))
            for place, row in zip(places.flatten().tolist(), rows, strict=True)
        ]
        buffer.elements = _extent(self.shape, (*strides, 1))
        buffer.spread = True
        self.views[name] = ((*strides, 1), False)
        self.never_read = [region for region in self.never_read if region[0] != name]

    def text(self, schedules: Sequence[Schedule]) -> str:
        """The description, but for the bytes."""
        grid = self.grid()
        sizes = [dim.size for dim in grid.cells]
        weights = (
            [self.coord_weight]
            if isinstance(self.coord_weight, (float, int))
            else []
            if isinstance(self.coord_weight, Tensor)
            else list(self.coord_weight)
        )
        ignore_value = math.nan if self.ignore_value is None else self.ignore_value
        lines = [
            ["grid", grid.maps.size, grid.images.size, grid.num_cells, *sizes],
            ["kinds", int(self.has_kinds)],
            ["weight_repeat", grid.weight_repeat],
            [
                "rule",
                self.output,
                self.divisor,
                int(self.wrt_target),
                int(self.grad_is_for_one),
                float(self.positive_weight).hex(),
                float(ignore_value).hex(),
            ],
            ["machine", self.resident_blocks],
            ["wide_index", int(self.wide_index)],
            ["coord_weights", *(float(weight).hex() for weight in weights)],
        ]
        if not isinstance(self.negative_weight, Tensor):
            lines.append(["negative_weight", float(self.negative_weight).hex()])
        for buffer in self.buffers.values():
            written, read = int(buffer.written), int(bool(buffer.pieces) or not buffer.written)
            lines.append(
                [
                    "buffer",
                    buffer.name,
                    _NAMES[buffer.dtype],
                    buffer.elements,
                    buffer.misaligned_by,
                    read,
                    written,
                ]
            )
            size = buffer.dtype.itemsize
            lines += [
                ["piece", buffer.name, begin * size, piece.numel() * size]
                for begin, piece in buffer.pieces
            ]
        for name in self.views:
            dims = (grid.images, grid.maps, *grid.cells)
            lines.append(["view", name, *(dim.strides[name] for dim in dims)])
        lines += [["never_read", *region] for region in self.never_read]
        lines += [["schedule", *schedule] for schedule in schedules]
        return "".join(" ".join(map(str, line)) + "\n" for line in lines)

    def grid(self) -> Grid:
        """The sizes and strides of the pass, after joining dimensions that lie as one in all."""
        nowhere = dict.fromkeys(self.views, 0)
        along = [
            _Dim(
                size,
                {
                    name: 0 if per_cell and dim == 1 else strides[dim - (per_cell and dim > 1)]
                    for name, (strides, per_cell) in self.views.items()
                },
            )
            for dim, size in enumerate(self.shape)
        ]
        maps = along.pop(1) if self.has_kinds else _Dim(1, nowhere)
        along = [dim for dim in along if dim.size != 1]
        if not self.has_kinds:
            along.sort(key=lambda dim: -dim.strides["pred"])
        dims: list[_Dim] = []
        for dim in along:
            joined = dims[-1].joined(dim) if dims else None
            dims[-1 if joined else len(dims) :] = [joined or dim]
        weight_repeat = 1
        if not self.has_kinds and "weight" in self.views and self.buffers["weight"].elements:
            # Where the weight repeats itself along the innermost dimension: so many cells have one.
            if len(dims) > 1 and dims[-1].strides["weight"] == 0:
                joined = dims[-2].joined(dims[-1], but="weight")
                if joined is not None:
                    weight_repeat = dims[-1].size
                    dims[-2:] = [joined]
            # Along another one: that is the maps.
            for i in reversed(range(len(dims) - 1)):
                if dims[i].strides["weight"] == 0:
                    maps = dims.pop(i)
                    break
        images = dims.pop(0) if len(dims) > 1 else _Dim(1, nowhere)
        return Grid(images, maps, dims or [_Dim(1, nowhere)], weight_repeat)


class Outcome(NamedTuple):
    results: list[dict[str, Tensor]]  # of each schedule: what it wrote, by name, as 1-D storage
    kernels: list[str]  # of each schedule: which was chosen, and in how many blocks


class RunError(AssertionError):
    """The kernels' run ended with a report; the message holds it and how to repeat the run."""


def run(
    description: Pass,
    how: str = "plain",
    schedules: Sequence[Schedule] = SCHEDULES,
    *,
    program: Path | None = None,
) -> Outcome:
    """Run a pass once for each schedule. Raises RunError where a run reports a fault."""
    program = program or build.program("run_pass", how)
    data = b"".join(
        _bytes(piece) for buffer in description.buffers.values() for _, piece in buffer.pieces
    )
    with tempfile.TemporaryDirectory() as folder:
        source, results = Path(folder, "pass"), Path(folder, "results")
        source.write_bytes(description.text(schedules).encode() + b"data\n" + data)
        done = subprocess.run(
            [program, source, results],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            env=build.BUILDS[how].environment,
        )
        if done.returncode != 0:
            kept = build.CACHE / "failed" / f"pass-{os.getpid()}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            source.replace(kept)
            raise RunError(
                f"exit code {done.returncode}; again: {program} {kept} /dev/null\n{done.stderr}"
            )
        written = results.read_bytes()
    return Outcome(_split(description, written, len(schedules)), done.stdout.splitlines())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two 1-D tensors hold the same bytes; a NaN is the same as itself."""
    return _bytes(a) == _bytes(b)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _split(description: Pass, written: bytes, runs: int) -> list[dict[str, Tensor]]:
    results = []
    at = 0
    for _ in range(runs):
        outcome = {}
        for buffer in description.buffers.values():
            if not buffer.written:
                continue
            elements = buffer.elements
            if buffer.spread:
                elements = sum(piece.numel() for _, piece in buffer.pieces)
            size = elements * buffer.dtype.itemsize
            flat = torch.empty(elements, dtype=buffer.dtype)
            if size:
                flat = torch.frombuffer(bytearray(written[at : at + size]), dtype=buffer.dtype)
            at += size
            outcome[buffer.name] = flat
        results.append(outcome)
    assert at == len(written), f"{len(written)} bytes of results, expected {at}"
    return results
