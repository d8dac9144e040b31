"""Faults planted in a copy of the kernels, and how each must be found.

A fault is an edit of the source as it stands. One that no longer applies is an error of this file,
not a fault that passes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_on_host import build
from cuda_on_host.cases import Case, both_channels_last, check, check_large
from cuda_on_host.passes import Layout, Schedule

KERNELS = Path("cuda", "fcrn_loss_kernels.cuh")
PASS = Path("loss_pass.h")
ELEMENT = Path("cell_loss.h")


# The vector kernels of the other dtypes are left out: none of the checks below needs them, and the
# copy compiles in half the time.
def _float32_only(source: str) -> str:
    return re.sub(r"\brun\(float\{\}, (BFloat16|Half)\{\}, \w+\{\}\)", "false", source)


@dataclass(frozen=True)
class Fault:
    """An edit that must apply exactly once, and a check that must fail with a certain message."""

    name: str
    old: str
    new: str
    how: str  # the build that finds it
    check: Callable[..., None]
    message: str  # a regular expression
    file: Path = KERNELS  # in csrc/

    def __str__(self) -> str:
        return self.name

    def plant(self, folder: Path) -> Path:
        """A copy of csrc/ with the fault in it."""
        copy = folder / "csrc"
        shutil.copytree(build.CSRC, copy)
        source = (copy / self.file).read_text()
        found = source.count(self.old)
        if found != 1:
            raise LookupError(
                f"{self.name}: {found} places in csrc/{self.file} match, one should; "
                f"adapt tests/cuda_on_host/faults.py to the kernels:\n{self.old}"
            )
        (copy / self.file).write_text(source.replace(self.old, self.new))
        (copy / KERNELS).write_text(_float32_only((copy / KERNELS).read_text()))
        return copy


def _checks(*cases: Case, schedules: tuple[Schedule, ...] = ()) -> Callable[..., None]:
    def run(how: str, **options: object) -> None:
        for case in cases:
            check(case, how, *((schedules,) if schedules else ()), **options)

    return run


_FORWARD = Schedule("forward")
_SEVERAL_BLOCKS = Case((2, 3, 34, 32), multiprocessors=1, positives="scattered")
_STRIDED = Case((2, 3, 13, 13), reduction="positive", positives="scattered")
_INTERLEAVED = Case((2, 7, 8, 16), reduction="sum", **both_channels_last())
_MISALIGNED = Case((2, 7, 8, 16), pred_layout=Layout(misaligned_by=1))
_PADDED = Case((3, 2, 4, 8), target_layout=Layout("padded"))
_NO_SUMS = Case((2, 3, 34, 32), reduction="none", multiprocessors=1)
_NO_POSITIVES = Case((2, 3, 8, 8), reduction="positive", positives="none")

_NOT_EQUAL = "not close|ulp apart|not equal"

FAULTS = (
    # ---- barriers --------------------------------------------------------------------------------
    Fault(
        "no barrier before the warps' sums are read, by a forward order",
        "threadIdx.x / kWarp] = sums;\n  __syncthreads();\n",
        "threadIdx.x / kWarp] = sums;\n",
        "quick",
        _checks(_SEVERAL_BLOCKS, schedules=(_FORWARD,)),
        _NOT_EQUAL,
    ),
    Fault(
        "no barrier before the warps' sums are read, by a backward order",
        "threadIdx.x / kWarp] = sums;\n  __syncthreads();\n",
        "threadIdx.x / kWarp] = sums;\n",
        "race-quick",
        _checks(_SEVERAL_BLOCKS, schedules=(Schedule("backward"),)),
        r"race: .* shared memory",
    ),
    Fault(
        "no barrier before the block knows that it is last",
        "  __syncthreads();\n  if (!is_last) return;\n",
        "  if (!is_last) return;\n",
        "race-quick",
        _checks(_SEVERAL_BLOCKS),
        r"race: .* shared memory",
    ),
    Fault(
        "a barrier in a branch",
        "  if (!is_last) return;\n",
        "  if (!is_last) return;\n  if (threadIdx.x < 64) __syncthreads();\n",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        "is at this block barrier while thread .* waits at the block barrier",
    ),
    # ---- tails -----------------------------------------------------------------------------------
    Fault(
        "the last vector is left out",
        " vector < vectors;",
        " vector + 1 < vectors;",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        _NOT_EQUAL,
    ),
    Fault(
        "one vector too many",
        " vector < vectors;",
        " vector <= vectors;",
        "sanitized-quick",
        _checks(_SEVERAL_BLOCKS),
        "AddressSanitizer: heap-buffer-overflow",
    ),
    Fault(
        "the last cell is left out",
        "; at < cells;",
        "; at + 1 < cells;",
        "quick",
        _checks(_STRIDED),
        _NOT_EQUAL,
    ),
    Fault(
        "the last elements of channels-last are left out",
        " first < elements;",
        " first + V < elements;",
        "quick",
        _checks(_INTERLEAVED),
        _NOT_EQUAL,
    ),
    # ---- warps -----------------------------------------------------------------------------------
    Fault(
        "half of the lanes in the mask",
        "kAll = 0xffffffffu;",
        "kAll = 0x0000ffffu;",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        "whose mask 0x0000ffff leaves it out|reads lane 16, which is not in it",
    ),
    Fault(
        "one step of the warp's sum is missing",
        "int offset = kWarp / 2;",
        "int offset = kWarp / 4;",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        _NOT_EQUAL,
    ),
    # ---- the ticket ------------------------------------------------------------------------------
    Fault(
        "a block draws no ticket",
        "is_last = atomicAdd(",
        "is_last = blockIdx.x != 1 && atomicAdd(",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        "3 blocks drew 2 tickets",
    ),
    Fault(
        "a block draws two tickets",
        "atomicAdd(workspace.ticket, 1u)",
        "atomicAdd(workspace.ticket, 2u)",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        "3 blocks drew 6 tickets",
    ),
    Fault(
        "the ticket of the launch before is counted on",
        "== gridDim.x - 1;",
        "== 2 * gridDim.x - 1;",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        _NOT_EQUAL,
    ),
    Fault(
        "a ticket is drawn where no sums are wanted",
        "image, cell, sums);\n  }\n  if (kForward && pass.wants_sums()) finish",
        "image, cell, sums);\n  }\n  if (kForward) finish",
        "sanitized-quick",
        _checks(_NO_SUMS),
        "AddressSanitizer: SEGV on unknown address 0x0000",
    ),
    Fault(
        "the last but one takes itself for the last",
        "== gridDim.x - 1;",
        "== gridDim.x - 2;",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        f"{_NOT_EQUAL}|depends on the order of threads",
    ),
    Fault(
        "no fence before the ticket is drawn",
        "    __threadfence();\n    is_last",
        "    is_last",
        "race-quick",
        _checks(_SEVERAL_BLOCKS),
        "race: .* block_sums",
    ),
    Fault(
        "no fence after the last ticket is drawn",
        "the ticket was drawn.\n    __threadfence();\n",
        "the ticket was drawn.\n",
        "race-quick",
        _checks(_SEVERAL_BLOCKS),
        "race: .* block_sums",
    ),
    # ---- masked elements -------------------------------------------------------------------------
    Fault(
        "pose maps are read where no cell is positive",
        "    if (any_positive) {\n",
        "    if (true) {\n",
        "sanitized-quick",
        _checks(_SEVERAL_BLOCKS),
        "AddressSanitizer: use-after-poison",
    ),
    Fault(
        "one byte of a masked element is read",
        "  Acc pose_error = 0;\n",
        "  Acc pose_error = 0;\n"
        "  (void)static_cast<const volatile char*>(pass.pred.data)"
        "[size_of(pass.pred.dtype) * pred_cell];\n",
        "race-quick",
        _checks(_STRIDED),
        "has no business to read",
    ),
    Fault(
        "an ignored cell's confidence is multiplied by 0",
        "counted ? weight.weight * (difference * difference) : Value{},",
        "Value(counted) * (weight.weight * (difference * difference)),",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        _NOT_EQUAL,
        ELEMENT,
    ),
    Fault(
        "an ignored cell's gradient is multiplied by 0",
        "counted ? weight.coefficient * difference : Value{}",
        "Value(counted) * (weight.coefficient * difference)",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        "gradient at .* is nan",
        ELEMENT,
    ),
    # ---- the kinds -------------------------------------------------------------------------------
    Fault(
        "the kinds are pred's",
        "load(at<const Target>(pass.kinds, image, 0, cell), kinds);",
        "load(at<const Pred>(pass.pred, image, last_map, cell), kinds);",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        _NOT_EQUAL,
    ),
    Fault(
        "the kinds are those of other maps",
        "at<const Target>(pass.kinds, image, 0, cell)",
        "at<const Target>(pass.kinds, image, 0, cell) + last_map",
        "sanitized-quick",
        _checks(_SEVERAL_BLOCKS),
        "misaligned address",
    ),
    Fault(
        "channels-last: the kinds lie side by side",
        "kinds[cell * maps]",
        "kinds[cell]",
        "quick",
        _checks(_INTERLEAVED),
        _NOT_EQUAL,
    ),
    Fault(
        "element by element: the kinds have maps",
        "load_element(pass.kinds, offset(pass.kinds), 0)",
        "load_element(pass.target, offset(pass.kinds), last_map - 1)",
        "sanitized-quick",
        _checks(_STRIDED),
        "AddressSanitizer",
    ),
    # ---- the divisor, and the sign ---------------------------------------------------------------
    Fault(
        "the loss is not divided by the count",
        "value / (divisor < 0 ? static_cast<double>(positives > 1 ? positives : 1) : divisor)",
        "value / (divisor < 0 ? 1.0 : divisor)",
        "quick",
        _checks(_STRIDED),
        "loss: .*not close",
        PASS,
    ),
    Fault(
        "the count divides though it is 0",
        "positives > 1 ? positives : 1)",
        "positives)",
        "quick",
        _checks(_NO_POSITIVES),
        "loss: .*not close",
        PASS,
    ),
    Fault(
        "the gradient is not divided by the count",
        "known_positive ? *known_positive : 1)",
        "1)",
        "quick",
        _checks(_STRIDED),
        "ulp apart",
        PASS,
    ),
    Fault(
        "the gradient of target has the sign of that of pred",
        "wrt_target ? -value : value",
        "value",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        "ulp apart",
        PASS,
    ),
    Fault(
        "a gradient for 1 is always right",
        "return grad_is_for_one && dloss_derror() == divided(1.0, 1);",
        "return grad_is_for_one;",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        "a rescaled gradient differs",
        PASS,
    ),
    Fault(
        "a gradient for 1 is computed again",
        "return grad_is_for_one && dloss_derror() == divided(1.0, 1);",
        "return false;",
        "sanitized-quick",
        _checks(_SEVERAL_BLOCKS),
        "AddressSanitizer: use-after-poison",
        PASS,
    ),
    # ---- indices and alignment -------------------------------------------------------------------
    Fault(
        "offsets of 32 bits for tensors of any size",
        "wide_index || !fits_32_bits(pass)",
        "wide_index",
        "quick",
        lambda how, **options: check_large(how, torch.float32, shape=(2, 3, 13), **options),
        "unsigned int",
    ),
    Fault(
        "a map's offset is cut to 32 bits",
        "load_as<Acc>(view.data, view.dtype, cell_at + map * static_cast<Index>(view.map_stride))",
        "load_as<Acc>(view.data, view.dtype, cell_at + uint32_t(map * view.map_stride))",
        "quick",
        lambda how, **options: check_large(how, torch.float32, **options),
        _NOT_EQUAL,
    ),
    Fault(
        "the vector path for any pointer",
        "view.is_planar(pass.grid) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&",
        "view.is_planar(pass.grid) &&",
        "quick",
        _checks(_MISALIGNED),
        "__ldg of 16 bytes at the misaligned address",
    ),
    Fault(
        "the vector path for any distance of images",
        "view.image_stride * size % 16 == 0 &&",
        "",
        "quick",
        _checks(_PADDED),
        "__ldg of 16 bytes at the misaligned address",
    ),
    # ---- what is written -------------------------------------------------------------------------
    Fault(
        "the gradient is not written where it is 0",
        "    if (pass.grad && (any_positive || write_zeros)) {\n",
        "    if (pass.grad && any_positive) {\n",
        "quick",
        _checks(_SEVERAL_BLOCKS),
        "gradient at .* is nan",
    ),
)
