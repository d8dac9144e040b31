"""The backends and devices under test, the options of the run and Hypothesis's profiles."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from implementations import IMPLEMENTATIONS, Implementation

# The processes that tests start find the package where this one does, installed or not; `pytest`
# itself, unlike `python -m pytest`, does not look in the current folder.
HERE = Path(__file__).resolve().parent
ROOT = str(HERE.parent)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
if ROOT not in sys.path:
    sys.path.append(ROOT)

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    collect_ignore = [
        each.name for each in HERE.glob("test_*.py") if "hypothesis" in each.read_text()
    ]
else:
    # The same examples in every run, so that a change that breaks nothing never fails by chance;
    # `pytest --hypothesis-profile=explore` looks for new ones.
    for name, examples in (("stable", 400), ("explore", 3000)):
        settings.register_profile(
            name,
            deadline=None,
            derandomize=name == "stable",
            print_blob=True,
            max_examples=examples,
            suppress_health_check=[HealthCheck.too_slow],
        )
    settings.load_profile("stable")
    collect_ignore = []


# Without a GPU the thousands of tests on one are left out, which the last lines of the run say.
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
UNDER_TEST = tuple(each for each in IMPLEMENTATIONS if each.device in DEVICES)


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
    config.addinivalue_line(
        "markers", "cuda: uses a GPU; set on every test with a parameter that does"
    )
    config.addinivalue_line(
        "markers", "sanitizer: for compute-sanitizer, every kernel in small sizes"
    )
    config.addinivalue_line("markers", "memory: needs so much that no two can run at once")
    missing = [
        f"{implementation}: {implementation.why_not()}"
        for implementation in IMPLEMENTATIONS
        if str(implementation) in config.getoption("--require") and implementation.why_not()
    ]
    if missing:
        raise pytest.UsageError("required by --require, but cannot run: " + "; ".join(missing))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what runs on a GPU, so that `-m cuda` leaves out what runs on the CPU alone."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        devices = (str(parameters.get(name)) for name in ("impl", "fused", "device"))
        if any(each.endswith("cuda") for each in devices):
            item.add_marker("cuda")
        code = getattr(getattr(item, "function", None), "__code__", None)
        if code and "needs_memory" in code.co_names:
            item.add_marker("memory")
    if "fused-cuda" in config.getoption("--require"):  # the kernels first: the time may be short
        items.sort(key=lambda item: "reference" in item.nodeid)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"{each}: {each.why_not() or 'under test'}" for each in IMPLEMENTATIONS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left_out := [str(each) for each in IMPLEMENTATIONS if each.device not in DEVICES]:
        terminalreporter.write_sep("=", "no CUDA device", yellow=True)
        terminalreporter.write_line(f"the tests of {' and '.join(left_out)} were left out")
    if collect_ignore:
        terminalreporter.write_sep("=", "no Hypothesis", yellow=True)
        terminalreporter.write_line(
            f"left out: {', '.join(collect_ignore)}; pip install hypothesis"
        )


def _or_skip(implementation: Implementation) -> Implementation:
    reason = implementation.why_not()
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")
    return implementation


@pytest.fixture(scope="module", params=UNDER_TEST, ids=str)
def impl(request: pytest.FixtureRequest) -> Implementation:
    """Each backend on each device; skipped, with the reason, where it cannot run."""
    return _or_skip(request.param)


@pytest.fixture(scope="module", params=[each for each in UNDER_TEST if each.is_fused], ids=str)
def fused(request: pytest.FixtureRequest) -> Implementation:
    """The compiled kernels on each device, for promises that plain PyTorch does not make."""
    return _or_skip(request.param)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device, for what is the same whoever computes."""
    device: str = request.param
    return device


@pytest.fixture(autouse=True)
def _give_gpu_memory_back() -> Iterator[None]:
    """A large test leaves the memory of the device to those of other processes."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture
def threads() -> Iterator[None]:
    """Let a test change the number of PyTorch's threads and put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
