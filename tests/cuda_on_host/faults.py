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


# The kernels of the other dtypes are left out: none of the checks below needs them, and the copy
# compiles in half the time.
def _float32_only(source: str) -> str:
    source, found = re.subn(r"!run\((BFloat16|Half)\{\}, \w+\{\}\)", "true", source)
    if found != 4:
        raise LookupError(f"{found} vector kernels of other dtypes, expected 4")
    double = "launch(strided_kernel<double, Index, kForward>, cells);"
    if source.count(double) != 1:
        raise LookupError(f"{source.count(double)} launches of double kernels, expected 1")
    return source.replace(double, "std::abort();")


def _checks(*cases: Case, schedules: tuple[Schedule, ...] = ()) -> Callable[..., None]:
    def run(how: str, **options: object) -> None:
        for case in cases:
            check(case, how, *((schedules,) if schedules else ()), **options)

    return run


_FORWARD = Schedule("forward")
_SEVERAL_BLOCKS = Case((2, 3, 34, 32), resident_blocks=8, positives="scattered")
_STRIDED = Case((2, 3, 13, 13), reduction="positive", positives="scattered")
_INTERLEAVED = Case((2, 7, 8, 16), reduction="sum", **both_channels_last())
_MISALIGNED = Case((2, 7, 8, 16), pred_layout=Layout(misaligned_by=1))
_ODD_MAPS = Case((2, 4, 8, 8), positives="all")
_ROUND = Case((2, 3, 34, 64), resident_blocks=2)
_SCATTERED_ROUND = Case((2, 3, 34, 64), resident_blocks=2, positives="scattered")
_MANY_MAPS = Case((2, 300, 2, 4), coord_weight="one")
_MANY_WEIGHTS = Case((2, 300, 2, 4), coord_weight="tensor")
_FEW_MAPS = Case((2, 2, 4, 4), **both_channels_last())
_PADDED = Case((3, 2, 4, 8), target_layout=Layout("padded"))
_CELL_ERRORS = Case((2, 3, 34, 32), reduction="cell", positives="scattered")
_EMPTY_BATCH = Case((0, 4, 2))
_NO_SUMS = Case((2, 3, 34, 32), reduction="none", resident_blocks=8)
_NO_POSITIVES = Case((2, 3, 8, 8), reduction="positive", positives="none")

# With weights and kinds of the caller's, by vectors and cell by cell; and without kinds.
_CELL_WEIGHTS = Case((2, 3, 8, 8), weight=(2, 1, 8, 8), positives="scattered")
_MAP_WEIGHTS = Case((2, 3, 8, 8), weight=(2, 3, 1, 1), positives="scattered")
_SKEWED_WEIGHTS = Case(
    (2, 3, 8, 8), weight=(2, 3, 8, 8), weight_layout=Layout("channels_last"), positives="scattered"
)
_MISALIGNED_WEIGHTS = Case((2, 3, 8, 8), weight=(2, 3, 8, 8), weight_layout=Layout(misaligned_by=1))
_GIVEN_KINDS = Case((2, 3, 8, 8), positive=(2, 1, 8, 8), positives="scattered")
_INTERLEAVED_WEIGHTS = Case((2, 3, 8, 8), weight=(2, 1, 8, 8), **both_channels_last())
_STRIDED_MAP_WEIGHTS = Case((2, 3, 5, 5), weight=(2, 3, 1, 1), positives="scattered")
_STRIDED_CELL_WEIGHTS = Case((2, 3, 5, 5), weight=(2, 1, 5, 5), positives="scattered")
_STRIDED_GIVEN_KINDS = Case((2, 3, 5, 5), positive=(2, 1, 5, 5), positives="scattered")
_ROWS = Case((4, 6, 10), weight=(4, 6, 1), has_kinds=False)
_STRIDED_ROWS = Case((3, 5, 7), weight=(3, 5, 1), has_kinds=False)
_PLANES = Case((2, 7, 8, 8), weight=(2, 7, 1, 1), weight_dtype=torch.bool, has_kinds=False)

_ONE_CASE = _checks(_SEVERAL_BLOCKS)
_NOT_EQUAL = "not close|ulp apart|not equal"


@dataclass(frozen=True)
class Fault:
    """An edit that must apply exactly once, and a check that must fail with a certain message."""

    name: str
    old: str
    new: str
    message: str = _NOT_EQUAL  # a regular expression
    check: Callable[..., None] = _ONE_CASE
    how: str = "quick"  # the build that finds it
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


FAULTS = (
    # ---- barriers --------------------------------------------------------------------------------
    Fault(
        "no barrier before the warps' sums are read, by a forward order",
        "threadIdx.x / kWarp] = sums;\n  __syncthreads();\n",
        "threadIdx.x / kWarp] = sums;\n",
        check=_checks(_SEVERAL_BLOCKS, schedules=(_FORWARD,)),
    ),
    Fault(
        "no barrier before the warps' sums are read, by a backward order",
        "threadIdx.x / kWarp] = sums;\n  __syncthreads();\n",
        "threadIdx.x / kWarp] = sums;\n",
        message=r"race: .* shared memory",
        check=_checks(_SEVERAL_BLOCKS, schedules=(Schedule("backward"),)),
        how="race-quick",
    ),
    Fault(
        "no barrier before the block knows that it is last",
        "  __syncthreads();\n  if (!is_last) return;\n",
        "  if (!is_last) return;\n",
        message=r"race: .* shared memory",
        how="race-quick",
    ),
    Fault(
        "a barrier in a branch",
        "  if (!is_last) return;\n",
        "  if (!is_last) return;\n  if (threadIdx.x < 64) __syncthreads();\n",
        message="is at this block barrier while thread .* waits at the block barrier",
    ),
    Fault(
        "no barrier before the weights are read",
        "    }\n    __syncthreads();\n",
        "    }\n",
        message=r"race: .* shared memory",
        how="race-quick",
    ),
    # ---- tails -----------------------------------------------------------------------------------
    Fault(
        "the last vector is left out",
        "is_valid = vector < vectors",
        "is_valid = vector + 1 < vectors",
    ),
    Fault(
        "one vector too many",
        "pass.grid.images) * vectors_per_image;",
        "pass.grid.images) * vectors_per_image + 1;",
        message="AddressSanitizer",
        how="sanitized-quick",
    ),
    Fault(
        "confidences behind the last vector are asked for",
        "    if (vector >= vectors) return;\n",
        "",
        message="AddressSanitizer",
        how="sanitized-quick",
    ),
    Fault(
        "the confidences are those of the next vector",
        "cells.confidences(place, confidence,",
        "cells.confidences(place, next_confidence,",
        check=_checks(_ROUND),
    ),
    Fault(
        "the last cell is left out", "; at < cells;", "; at + 1 < cells;", check=_checks(_STRIDED)
    ),
    Fault(
        "the last elements of channels-last are left out",
        " first < elements;",
        " first + V < elements;",
        check=_checks(_INTERLEAVED),
    ),
    Fault(
        "an odd number of maps ends with one too many",
        "if (map >= num_maps) break;",
        "",
        message=f"{_NOT_EQUAL}|nan",
        check=_checks(_ODD_MAPS),
    ),
    Fault(
        "the maps that are asked for at once are one",
        "load(maps[j], place, first + j * step);",
        "load(maps[j], place, first);",
        check=_checks(_ODD_MAPS),
    ),
    Fault(
        "more blocks than can run at once",
        "std::min(wanted, resident_blocks)",
        "wanted",
        message="in 5 blocks",
        check=_checks(_ROUND),
    ),
    # ---- warps -----------------------------------------------------------------------------------
    Fault(
        "half of the lanes in the mask",
        "kAllLanes = 0xffffffffu;",
        "kAllLanes = 0x0000ffffu;",
        message="whose mask 0x0000ffff leaves it out|reads lane 16, which is not in it",
    ),
    Fault(
        "one step of the warp's sum is missing",
        "int offset = kWarp / 2;",
        "int offset = kWarp / 4;",
    ),
    Fault(
        "no barrier before a warp's list is read",
        "        __syncwarp();\n        // So many lanes",
        "        // So many lanes",
        message=r"race: .* shared memory",
        how="race-quick",
    ),
    Fault(
        "no barrier before a warp's next list is written",
        "        __syncwarp();  // the list is read before the next is written\n",
        "",
        message=r"race: .* shared memory",
        check=_checks(_SCATTERED_ROUND),
        how="race-quick",
    ),
    Fault(
        "a lane works for one that is not on the list",
        "first_of_warp + entry %",
        "first_of_warp + mine %",
        message=f"{_NOT_EQUAL}|depends on the order of threads",
    ),
    Fault(
        "the cells of a listed lane all have a pose",
        "listed_pose = entry >> 8;",
        "listed_pose = 15;",
        message=f"{_NOT_EQUAL}|depends on the order of threads",
    ),
    Fault("the lanes share out a map twice", "step = kWarp >> log2_lanes;", "step = 1;"),
    Fault(
        "the errors of a cell are added up by another lane",
        " && !cells.writes_cell_errors()) {",
        ") {",
        check=_checks(_CELL_ERRORS),
    ),
    # ---- the ticket ------------------------------------------------------------------------------
    Fault(
        "a block draws no ticket",
        "is_last = atomicAdd(",
        "is_last = blockIdx.x != 1 && atomicAdd(",
        message="3 blocks drew 2 tickets",
    ),
    Fault(
        "a block draws two tickets",
        "atomicAdd(workspace.ticket, 1u)",
        "atomicAdd(workspace.ticket, 2u)",
        message="3 blocks drew 6 tickets",
    ),
    Fault(
        "the ticket of the launch before is counted on",
        "== gridDim.x - 1;",
        "== 2 * gridDim.x - 1;",
    ),
    Fault(
        "a ticket is drawn where no sums are wanted",
        "  if (!pass.wants_sums()) return;\n",
        "",
        message="AddressSanitizer: SEGV on unknown address 0x0000",
        check=_checks(_NO_SUMS),
        how="sanitized-quick",
    ),
    Fault(
        "the last but one takes itself for the last",
        "== gridDim.x - 1;",
        "== gridDim.x - 2;",
        message=f"{_NOT_EQUAL}|depends on the order of threads",
    ),
    Fault(
        "no fence before the ticket is drawn",
        "    __threadfence();\n    is_last",
        "    is_last",
        message="race: .* block_sums",
        how="race-quick",
    ),
    Fault(
        "no fence after the last ticket is drawn",
        "the ticket was drawn.\n    __threadfence();\n",
        "the ticket was drawn.\n",
        message="race: .* block_sums",
        how="race-quick",
    ),
    # ---- masked elements -------------------------------------------------------------------------
    Fault(
        "pose maps are read where no cell is positive",
        "      if (listed_pose) {\n",
        "      if (true) {\n",
        message="AddressSanitizer: use-after-poison",
        how="sanitized-quick",
    ),
    Fault(
        "one byte of a masked element is read",
        "  Acc pose_error = 0, error = 0;\n",
        "  Acc pose_error = 0, error = 0;\n"
        "  (void)static_cast<const volatile char*>(pass.pred.data)"
        "[size_of(pass.pred.dtype) * pred_cell];\n",
        message="has no business to read",
        check=_checks(_STRIDED),
        how="race-quick",
    ),
    Fault(
        "an ignored cell's confidence is multiplied by 0",
        "counted ? weight.weight * (difference * difference) : Value{},",
        "Value(counted) * (weight.weight * (difference * difference)),",
        file=ELEMENT,
    ),
    Fault(
        "an ignored cell's gradient is multiplied by 0",
        "counted ? weight.coefficient * difference : Value{}",
        "Value(counted) * (weight.coefficient * difference)",
        message="gradient at .* is nan",
        file=ELEMENT,
    ),
    Fault(
        "a weight of 0 is multiplied",
        "  counted = static_cast<Mask>(counted & (given != Value{}));\n",
        "  (void)counted;\n",
        message="nan",
        check=_checks(_CELL_WEIGHTS),
        file=ELEMENT,
    ),
    Fault(
        "cells that the weight masks are read",
        "uint32_t(kind.positive && (!has_weight_per_cell() || counted)) << i;",
        "uint32_t(kind.positive) << i;",
        message="AddressSanitizer: use-after-poison",
        check=_checks(_CELL_WEIGHTS),
        how="sanitized-quick",
    ),
    Fault(
        "a plane that is masked as a whole is read",
        "uint32_t(!has_weight_per_cell() || given[i] != Acc(0)) << i;",
        "1u << i;",
        message="AddressSanitizer: use-after-poison",
        check=_checks(_PLANES),
        how="sanitized-quick",
    ),
    Fault(
        "element by element: an element that the weight masks is read",
        "    if (counted) {\n      if (per_cell)",
        "    if (counted || pass.weight) {\n      if (per_cell)",
        message="nan",
        check=_checks(_STRIDED_CELL_WEIGHTS),
    ),
    # ---- weights of the caller's -----------------------------------------------------------------
    Fault(
        "the weights lie side by side",
        "const auto stride = static_cast<uint32_t>(view.cell_strides[0]);",
        "const uint32_t stride = 1;",
        check=_checks(_SKEWED_WEIGHTS),
    ),
    Fault(
        "the weights of all maps are those of the first",
        "load_given(pass.weight, repeat, place.image, map, place.cell, given);",
        "load_given(pass.weight, repeat, place.image, 0, place.cell, given);",
        check=_checks(_MAP_WEIGHTS),
    ),
    Fault(
        "element by element: the weights of all maps are those of the first",
        "load_element(pass.weight, weight_cell, map)",
        "load_element(pass.weight, weight_cell, 0)",
        check=_checks(_STRIDED_MAP_WEIGHTS),
    ),
    Fault(
        "weights are read by the vector wherever they lie",
        "given.may_lie_at(from + cell)",
        "true",
        message="__ldg of 16 bytes at the misaligned address",
        check=_checks(_MISALIGNED_WEIGHTS),
    ),
    Fault(
        "a block keeps the weights of any number of maps",
        " || pass.coord_weights.count > kPoseWeights",
        "",
        message="strided",
        check=_checks(_MANY_WEIGHTS),
    ),
    Fault(
        "one weight is looked for behind what a block keeps",
        "map < kPoseWeights ? map : kPoseWeights - 1",
        "map",
        check=_checks(_MANY_MAPS),
    ),
    Fault(
        "every cell of a row has its own weight",
        "static_cast<uint32_t>(pass.weight_repeat) : 1;",
        "1u : 1u;",
        message="AddressSanitizer: heap-buffer-overflow",
        check=_checks(_ROWS),
        how="sanitized-quick",
    ),
    Fault(
        "all of a vector are of one row",
        "stride == 0 || repeat % V == 0;",
        "stride == 0 || repeat >= V;",
        check=_checks(_ROWS),
    ),
    Fault(
        "element by element: every cell of a row has its own weight",
        "if (weight_repeat == 1) return",
        "if (true) return",
        message="AddressSanitizer: heap-buffer-overflow",
        check=_checks(_STRIDED_ROWS),
        how="sanitized-quick",
        file=PASS,
    ),
    Fault(
        "channels-last: the weights are not looked at",
        "return pass.is_plain() && !pass.has_grad_output_per_cell()",
        "return !pass.has_grad_output_per_cell()",
        message="interleaved_kernel",
        check=_checks(_INTERLEAVED_WEIGHTS),
    ),
    Fault(
        "channels-last: an empty batch has the elements of an image",
        "pass.grid.images * pass.grid.cells * pass.grid.maps);",
        "pass.grid.cells * pass.grid.maps);",
        message="AddressSanitizer: SEGV",
        check=_checks(_EMPTY_BATCH),
        how="sanitized-quick",
    ),
    Fault(
        "without kinds the last map is left out",
        "return has_kinds ? grid.maps - 1 : grid.maps;",
        "return grid.maps - 1;",
        check=_checks(_ROWS),
        file=PASS,
    ),
    # ---- the kinds -------------------------------------------------------------------------------
    Fault("the kinds are pred's", "confidence.target.values[i]", "confidence.pred.values[i]"),
    Fault(
        "channels-last: the kinds lie side by side",
        "(of_first_cell < V ? maps : 0)",
        "(of_first_cell < V ? 1 : 0)",
        check=_checks(_INTERLEAVED),
    ),
    Fault(
        "channels-last: elements of more than two cells",
        "pass.grid.maps >= v - 1 && ",
        "",
        message="strided",
        check=_checks(_FEW_MAPS),
    ),
    Fault(
        "element by element: the kinds have maps",
        "load_element(pass.kinds, offset(pass.kinds), 0)",
        "load_element(pass.target, offset(pass.kinds), pose_maps - 1)",
        message="AddressSanitizer",
        check=_checks(_STRIDED),
        how="sanitized-quick",
    ),
    Fault(
        "which cells are positive is not for the caller to say",
        "has_positive = kGeneral && pass.positive;",
        "has_positive = false;",
        check=_checks(_GIVEN_KINDS),
    ),
    Fault(
        "element by element: which cells are positive is not for the caller to say",
        "kind = pass.positive ? ",
        "kind = false ? ",
        check=_checks(_STRIDED_GIVEN_KINDS),
    ),
    Fault(
        "a cell whose confidence is masked counts among the positive",
        "      num_positive += kind.positive && counted;",
        "      num_positive += kind.positive;",
        message="num_positive",
        check=_checks(_CELL_WEIGHTS),
    ),
    Fault(
        "element by element: a cell whose confidence is masked counts among the positive",
        "error;\n    sums.num_positive += kind.positive && counted;",
        "error;\n    sums.num_positive += kind.positive;",
        message="num_positive",
        check=_checks(_STRIDED_CELL_WEIGHTS),
    ),
    # ---- the divisor, and the sign ---------------------------------------------------------------
    Fault(
        "the loss is not divided by the count",
        "divisor < 0 ? counted : divisor",
        "divisor < 0 ? 1.0 : divisor",
        message="loss: .*not close",
        check=_checks(_STRIDED),
        file=PASS,
    ),
    Fault(
        "the count divides though it is 0",
        "positives > 1 ? positives : 1)",
        "positives)",
        message="loss: .*not close",
        check=_checks(_NO_POSITIVES),
        file=PASS,
    ),
    Fault(
        "the gradient is not divided by the count",
        "known_positive ? *known_positive : 1)",
        "1)",
        message="ulp apart",
        check=_checks(_STRIDED),
        file=PASS,
    ),
    Fault(
        "the sum of the weights does not divide",
        "known_divisor ? *known_divisor : divisor < 0",
        "divisor < 0",
        message="loss: .*not close",
        check=_checks(_ROWS),
        file=PASS,
    ),
    Fault(
        "the gradient of target has the sign of that of pred",
        "wrt_target ? -value : value",
        "value",
        message="ulp apart",
        file=PASS,
    ),
    Fault(
        "a gradient for 1 is always right",
        "return grad_is_for_one && dloss_derror() == divided(1.0, 1);",
        "return grad_is_for_one;",
        message="a rescaled gradient differs",
        file=PASS,
    ),
    Fault(
        "a gradient for 1 is computed again",
        "return grad_is_for_one && dloss_derror() == divided(1.0, 1);",
        "return false;",
        message="AddressSanitizer: use-after-poison",
        how="sanitized-quick",
        file=PASS,
    ),
    # ---- indices and alignment -------------------------------------------------------------------
    Fault(
        "offsets of 32 bits for tensors of any size",
        "wide_index || !fits_32_bits(pass)",
        "wide_index",
        message="unsigned int",
        check=lambda how, **options: check_large(how, torch.float32, shape=(2, 3, 13), **options),
    ),
    Fault(
        "offsets of 32 bits for weights of any size",
        "fits(pass.weight) && ",
        "",
        message="planar_kernel",
        check=lambda how, **options: check_large(
            how, torch.float32, shape=(2, 3, 8), weight=True, **options
        ),
    ),
    Fault(
        "a map's offset is cut to 32 bits",
        "load_as<Acc>(view.data, view.dtype, cell_at + map * static_cast<Index>(view.map_stride))",
        "load_as<Acc>(view.data, view.dtype, cell_at + uint32_t(map * view.map_stride))",
        check=lambda how, **options: check_large(how, torch.float32, **options),
    ),
    Fault(
        "the vector path for any pointer",
        "view.is_planar(pass.grid) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&",
        "view.is_planar(pass.grid) &&",
        message="__ldg of 16 bytes at the misaligned address",
        check=_checks(_MISALIGNED),
    ),
    Fault(
        "the vector path for any distance of images",
        "view.image_stride * size % 16 == 0 &&",
        "",
        message="__ldg of 16 bytes at the misaligned address",
        check=_checks(_PADDED),
    ),
    # ---- what is written -------------------------------------------------------------------------
    Fault(
        "the gradient is not written where it is 0",
        "if (is_valid && !with_pose && cells.writes_zeros()) ",
        "if (false) ",
        message="gradient at .* is nan",
    ),
)
