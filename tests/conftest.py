"""The backends and devices under test, the options of the run and Hypothesis's profiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from implementations import IMPLEMENTATIONS, Implementation

# Processes that tests start find the package where this one does, installed or not.
ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

# The same examples in every run, so that a change that breaks nothing never fails by chance;
# `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile(
    "stable",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=400,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    deadline=None,
    print_blob=True,
    max_examples=3000,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("stable")


# Without a GPU the thousands of tests on one are left out, which the last lines of the run say.
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
HERE = tuple(each for each in IMPLEMENTATIONS if each.device in DEVICES)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        default=[],
        choices=[str(implementation) for implementation in IMPLEMENTATIONS],
        help="fail, instead of skipping, where this backend and device cannot run",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about five seconds")
    missing = [
        f"{implementation}: {implementation.why_not()}"
        for implementation in IMPLEMENTATIONS
        if str(implementation) in config.getoption("--require") and implementation.why_not()
    ]
    if missing:
        raise pytest.UsageError("required by --require, but cannot run: " + "; ".join(missing))


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"{each}: {each.why_not() or 'under test'}" for each in IMPLEMENTATIONS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left_out := [str(each) for each in IMPLEMENTATIONS if each.device not in DEVICES]:
        terminalreporter.write_sep("=", "no CUDA device", yellow=True)
        terminalreporter.write_line(f"the tests of {' and '.join(left_out)} were left out")


def _or_skip(implementation: Implementation) -> Implementation:
    reason = implementation.why_not()
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")
    return implementation


@pytest.fixture(scope="module", params=HERE, ids=str)
def impl(request: pytest.FixtureRequest) -> Implementation:
    """Each backend on each device; skipped, with the reason, where it cannot run."""
    return _or_skip(request.param)


@pytest.fixture(scope="module", params=[each for each in HERE if each.is_fused], ids=str)
def fused(request: pytest.FixtureRequest) -> Implementation:
    """The compiled kernels on each device, for promises that plain PyTorch does not make."""
    return _or_skip(request.param)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device, for what is the same whoever computes."""
    device: str = request.param
    return device


@pytest.fixture
def threads() -> Iterator[None]:
    """Let a test change the number of PyTorch's threads and put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
