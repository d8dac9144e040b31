"""The CUDA kernels' own source, compiled for the host and run: tests/cuda_on_host/README.md."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cuda_on_host import build
from cuda_on_host.cases import CASES, Batch, Case, check, check_large
from cuda_on_host.faults import FAULTS, Fault
from cuda_on_host.passes import SCHEDULES, Schedule

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Path]]]:
    """The programs with the kernels, by build or by fault, compiled while other tests run."""

    def planted(fault: Fault) -> Path:
        csrc = fault.plant(tmp_path_factory.mktemp("fault"))
        return build.program("run_pass", fault.how, csrc=csrc)

    with ThreadPoolExecutor(max_workers=1) as pool:
        programs = {
            how: pool.submit(build.program, "run_pass", how)
            for how in ("plain", "sanitized", "race")
        }
        yield programs | {fault.name: pool.submit(planted, fault) for fault in FAULTS}
        pool.shutdown(wait=False, cancel_futures=True)


FAULT_EXIT_CODE = 3  # kFaultExitCode of grid.h
SELFTEST_BUILDS = ("plain", "ucontext", "sanitized", "race")
ORDERS = ("forward", "backward", "shuffled")


# The harness itself: what is right passes in every build and order, what is wrong is reported.


def selftest(
    scenario: str, how: str, order: str, seed: int = 0, resident_blocks: int = 1
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [build.program("selftest", how), scenario, order, str(seed), str(resident_blocks)],
        capture_output=True,
        text=True,
        timeout=60,
        env=build.BUILDS[how].environment,
    )


@pytest.mark.parametrize("how", SELFTEST_BUILDS)
@pytest.mark.parametrize("scenario", ["sum", "warp", "shared", "atomics", "neighbour"])
def test_right_kernels_pass(scenario: str, how: str) -> None:
    for order in ORDERS:
        for resident_blocks in (1, 3):
            result = selftest(scenario, how, order, 7, resident_blocks)
            assert result.returncode == 0, result.stderr
            assert result.stdout
            assert "WRONG" not in result.stdout, (order, resident_blocks)


REPORTED = {
    "barrier_in_branch": "threads 40 to 40: has returned",
    "barrier_at_two_sites": "is at this block barrier while thread",
    "barrier_after_return": "threads 32 to 95: has returned",
    "shuffle_without_lane": "shuffle",
    "shuffle_mask_without_caller": "mask 0x0000ffff",
    "shuffle_from_outside_mask": "reads lane 16, which is not in it",
    "shuffle_at_two_sites": "calls a shuffle with mask 0xffffffff while lane",
    "shuffle_and_barrier": "warp barrier",
    "shuffle_width_of_three": "width 3",
    "misaligned_load": "__ldcs of 16 bytes at the misaligned address",
    "misaligned_store": "__stcs of 8 bytes at the misaligned address",
    "block_too_large": "a block of 1025 threads",
}


@pytest.mark.parametrize("scenario", REPORTED)
def test_wrong_kernels_are_reported(scenario: str) -> None:
    for how in ("plain", "sanitized"):
        for order in ORDERS:
            result = selftest(scenario, how, order)
            assert result.returncode == FAULT_EXIT_CODE, (how, order, result.stderr)
            assert REPORTED[scenario] in result.stderr, (how, order)
            assert result.stdout == ""


def test_report_names_block_thread_and_line() -> None:
    result = selftest("shuffle_mask_without_caller", "plain", "backward")
    assert "block 6 thread 95 (warp 2 lane 31)" in result.stderr
    assert "at selftest.cpp:" in result.stderr


# What these get wrong is hidden by some orders, or by all: with the vector clocks it is not.
RACES = {
    "sum_no_barrier_before_read": "shared memory",
    "sum_no_barrier_after_ticket": "shared memory",
    "sum_no_fence_before_ticket": "partials",
    "sum_no_fence_after_ticket": "partials",
    "sum_ticket_not_atomic": "ticket",
    "sum_ticket_reset_by_hand": "an atomic",
    "neighbour_not_synchronised": "shared memory",
}


@pytest.mark.parametrize("scenario", RACES)
def test_races_are_found_in_every_order(scenario: str) -> None:
    for order in ORDERS:
        for resident_blocks in (1, 3):
            result = selftest(scenario, "race", order, 1, resident_blocks)
            assert result.returncode == FAULT_EXIT_CODE, (order, resident_blocks)
            assert RACES[scenario] in result.stderr
            assert "selftest.cpp:" in result.stderr


def test_lost_ticket_shows() -> None:
    assert "sum WRONG" in selftest("sum_ticket_lost", "plain", "forward").stdout


def test_stack_overflow_stops_at_the_guard_page() -> None:
    assert selftest("stack_overflow", "plain", "forward").returncode < 0  # killed by a signal


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("atomicAdd(sum, 1.0);", "no floating-point atomics"),
        ("atomicAdd(reinterpret_cast<short*>(sum), 1);", "integers of 4 and 8 bytes"),
        ("__shfl_down_sync(~0u, Wide{}, 1);", "arithmetic types of 4 and 8 bytes"),
        ("__ldcs(reinterpret_cast<const Odd*>(sum));", "1, 2, 4, 8 or 16 bytes"),
        ("__shfl_down(1, 1);", "'__shfl_down' was not declared"),
        ("__nanosleep(1);", "'__nanosleep' was not declared"),
        ("extern __shared__ float dynamic[];", "conflicting specifiers"),
        ("threadIdx.x = 0;", "read-only"),
    ],
)
def test_what_the_shim_lacks_does_not_compile(statement: str, message: str) -> None:
    source = """
        #include "cuda_runtime.h"
        struct Wide { double a, b; };
        struct Odd { char bytes[12]; };
        __global__ void kernel(double* sum) { %s }
    """
    assert build.compile_snippet(source % "__syncthreads();") == ""
    assert message in build.compile_snippet(source % statement).replace("‘", "'").replace("’", "'")


# The kernels, unchanged: they must pass every check before a planted fault counts as found.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_the_reference_in_every_order(case: Case) -> None:
    check(case, "plain")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_touch_no_byte_that_they_must_not(case: Case) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, with the masked elements poisoned.

    Where no vector kernel serves, with offsets of 64 bits: so those kernels see many cases too.
    """
    batch = Batch(case)
    wide_index = batch.kernel(batch.forward()) == "strided"
    check(case, "sanitized", SCHEDULES[2:], wide_index=wide_index)


def test_every_kernel_is_run() -> None:
    """One case for each kernel, with offsets of 32 bits and of 64, by forward and backward."""
    one_case = {}
    for case in CASES:
        forward = Batch(case).forward()
        if "loss" in forward.buffers and math.prod(case.shape) < 10_000:
            kernel = Batch(case).kernel(forward)
            one_case[kernel, case.pred_dtype, case.target_dtype, case.is_plain] = case
    ran = set()
    for case in one_case.values():
        ran |= check(case, "plain", SCHEDULES[:1])
        ran |= check(case, "plain", SCHEDULES[:1], wide_index=True)
    compiled = subprocess.run(
        ["nm", "--demangle", build.program("run_pass", "plain")], capture_output=True, text=True
    ).stdout
    kernels = set(re.findall(r"void fcrn::cuda::\w+_kernel<.*?>(?=\()", compiled))
    assert ran <= kernels
    assert not kernels - ran, "no case runs these kernels"


# What the clocks find does not depend on the values, nor on the order of the threads.
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_kernels_have_no_races(case: Case) -> None:
    check(case, "race", SCHEDULES[2:])


@pytest.mark.parametrize("seed", range(5))
def test_many_blocks_in_many_orders(seed: int) -> None:
    case = Case((2, 3, 66, 64), resident_blocks=8, positives="scattered", seed=seed)
    check(case, "plain", [Schedule("shuffled", seed * 8 + i, i + 1) for i in range(8)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "strides", "kernel"),
    [
        ((2, 3, 16), ((1 << 32) + 80, (1 << 31) + 8), "strided"),
        ((2, 3, 13), ((1 << 32) + 80, (1 << 31) + 8), "strided"),
        ((2, 3, 16), ((1 << 32) + 80, (1 << 31) + 1), "strided"),
        ((2, 2, 3, 8), (32, 16, (1 << 31) + 64), "strided"),
        # the last offset is the largest for 32 bits, and the one after
        ((2, 2, 8), ((1 << 31) - 32, 16), "planar"),
        ((2, 2, 8), ((1 << 31) - 24, 16), "strided"),
    ],
)
def test_offsets_beyond_32_bits(
    shape: tuple[int, ...], strides: tuple[int, ...], kernel: str, dtype: torch.dtype
) -> None:
    check_large("plain", dtype, shape=shape, strides=strides, kernel=kernel)


@pytest.mark.parametrize("beyond", [False, True])
def test_offsets_of_weights_beyond_32_bits(beyond: bool) -> None:
    strides = ((1 << 31) - (24 if beyond else 32), 16)
    kernel = "strided" if beyond else "planar"
    check_large("plain", shape=(2, 2, 8), strides=strides, kernel=kernel, weight=True)


# The faults.


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_planted_fault_is_found(fault: Fault, compiled: dict[str, Future[Path]]) -> None:
    program = compiled[fault.name].result()
    with pytest.raises(AssertionError) as found:
        fault.check(fault.how, program=program)
    assert re.search(fault.message, str(found.value), re.DOTALL), found.value


def test_fault_that_no_longer_applies_is_an_error(tmp_path: Path) -> None:
    gone = Fault("gone", "no such line in the kernels", "")
    with pytest.raises(LookupError, match="0 places in csrc/cuda/"):
        gone.plant(tmp_path)
