"""The CUDA kernels' own source, compiled for the host and run: tests/cuda_on_host/README.md."""

from __future__ import annotations

import subprocess

import pytest
from cuda_on_host import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

FAULT_EXIT_CODE = 3  # kFaultExitCode of grid.h
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


@pytest.mark.parametrize("how", build.BUILDS)
@pytest.mark.parametrize("scenario", ["sum", "warp", "shared", "atomics", "neighbour"])
def test_right_kernels_pass(scenario: str, how: str) -> None:
    for order in ORDERS:
        for resident_blocks in (1, 3):
            result = selftest(scenario, how, order, 7, resident_blocks)
            assert result.returncode == 0, result.stderr
            assert result.stdout and "WRONG" not in result.stdout, (order, resident_blocks)


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
