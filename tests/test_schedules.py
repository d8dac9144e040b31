"""The schedules of the negative weight."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fcrn_fused
from fcrn_fused import FCRNLoss, LinearNegativeWeight, StepNegativeWeight

SCHEDULES: dict[str, Callable[[FCRNLoss], Any]] = {
    "step": lambda loss: StepNegativeWeight(loss, step_size=3, gamma=1.5),
    "linear": lambda loss: LinearNegativeWeight(loss, total_iters=7),
}
each_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES.keys())


def filled(loss: FCRNLoss) -> float:
    return loss.negative_weight.item()


def test_the_authors_schedule_reaches_one_after_about_9500_iterations() -> None:
    """0.01 * 1.05^k: 94 updates give 0.98, the 95th reaches 1."""
    loss = FCRNLoss()
    schedule = StepNegativeWeight(loss)
    weights = []
    for iteration in range(9_700):
        assert schedule.last_step == iteration
        weights.append(filled(loss))
        schedule.step()
    assert weights[0] == pytest.approx(0.01)
    assert weights[99] == weights[0]
    assert weights[100] == pytest.approx(0.0105)
    assert weights[9_499] == pytest.approx(0.01 * 1.05**94)
    assert weights[9_499] < 1
    assert weights[9_500] == 1
    assert weights[-1] == 1
    assert len(set(weights)) == 96
    assert math.ceil(math.log(100) / math.log(1.05)) == 95


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6, 10, 50])
def test_step_values(steps: int) -> None:
    loss = FCRNLoss()
    schedule = StepNegativeWeight(loss, initial=0.1, gamma=1.5, step_size=3, final=0.9)
    for _ in range(steps):
        schedule.step()
    want = min(0.9, 0.1 * 1.5 ** (steps // 3))
    assert schedule.get_last_weight() == pytest.approx(want)
    assert filled(loss) == pytest.approx(want)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 50])
def test_linear_values(steps: int) -> None:
    loss = FCRNLoss()
    schedule = LinearNegativeWeight(loss, initial=0.2, final=1.0, total_iters=4)
    for _ in range(steps):
        schedule.step()
    want = 0.2 + 0.8 * min(1, steps / 4)
    assert schedule.get_last_weight() == pytest.approx(want)
    assert filled(loss) == pytest.approx(want)


def test_linear_defaults_and_its_exact_end() -> None:
    loss = FCRNLoss()
    schedule = LinearNegativeWeight(loss, total_iters=3)
    assert filled(loss) == pytest.approx(0.01)
    for _ in range(3):
        schedule.step()
    assert filled(loss) == 1.0
    assert schedule.get_last_weight() == 1.0


def test_a_schedule_may_lower_the_weight() -> None:
    loss = FCRNLoss()
    schedule: Any = LinearNegativeWeight(loss, initial=1.0, final=0.0, total_iters=2)
    schedule.step()
    assert filled(loss) == 0.5
    schedule = StepNegativeWeight(loss, initial=0.8, gamma=0.5, step_size=1)
    schedule.step()
    assert filled(loss) == pytest.approx(0.4)


@each_schedule
def test_the_weight_is_filled_in_place_from_construction_on(
    make: Callable[[FCRNLoss], Any],
) -> None:
    loss = FCRNLoss(negative_weight=0.7)
    buffer = loss.negative_weight
    schedule = make(loss)
    assert schedule.last_step == 0
    for _ in range(5):
        assert loss.negative_weight is buffer
        assert filled(loss) == pytest.approx(schedule.get_last_weight())
        schedule.step()
    assert schedule.last_step == 5
    assert filled(loss) > 0.01


@pytest.mark.parametrize("gamma", [1.05, 1e300])
def test_ten_million_steps_do_not_overflow(gamma: float) -> None:
    loss = FCRNLoss()
    schedule = StepNegativeWeight(loss, gamma=gamma, step_size=1)
    schedule.load_state_dict({**schedule.state_dict(), "last_step": 10**7})
    assert filled(loss) == 1.0
    schedule.step()
    assert schedule.get_last_weight() == 1.0


def test_ten_million_steps_of_extremes() -> None:
    loss = FCRNLoss()
    for settings, want in (
        ({"initial": 0.0}, 0.0),
        ({"gamma": 0.5}, 0.0),
        ({"gamma": 1.0, "initial": 0.25}, 0.25),
        ({"final": 0.0}, 0.0),
        ({"final": 3.5}, 3.5),
    ):
        schedule = StepNegativeWeight(loss, **{"step_size": 1, **settings})
        schedule.load_state_dict({**schedule.state_dict(), "last_step": 10**7})
        assert filled(loss) == want, settings


@each_schedule
def test_state_is_plain_values_and_loads_with_weights_only(
    make: Callable[[FCRNLoss], Any],
) -> None:
    schedule = make(FCRNLoss())
    for _ in range(5):
        schedule.step()
    state = schedule.state_dict()
    assert state["last_step"] == 5
    assert all(type(value) in (int, float, str, bool) for value in state.values())
    buffer = io.BytesIO()
    torch.save({"schedule": state}, buffer)
    buffer.seek(0)
    loss = FCRNLoss()
    resumed = make(loss)
    resumed.load_state_dict(torch.load(buffer, weights_only=True)["schedule"])
    assert resumed.last_step == 5
    assert filled(loss) == filled(schedule.loss)
    for _ in range(4):
        schedule.step(), resumed.step()
        assert filled(loss) == filled(schedule.loss)


def test_state_brings_its_settings_along() -> None:
    loss = FCRNLoss()
    other = StepNegativeWeight(loss)
    state = StepNegativeWeight(FCRNLoss(), initial=0.5, gamma=2.0, step_size=7, final=0.6)
    other.load_state_dict(state.state_dict())
    assert filled(loss) == 0.5
    for _ in range(7):
        other.step()
    assert filled(loss) == pytest.approx(0.6)


def test_numbers_of_numpy_leave_plain_state() -> None:
    schedule = StepNegativeWeight(
        FCRNLoss(), initial=np.float32(0.5), gamma=np.float64(2.0), step_size=np.int64(3)
    )
    assert all(type(value) in (int, float) for value in schedule.state_dict().values())


@pytest.mark.parametrize("state", [{}, {"last_step": 1}], ids=str)
@each_schedule
def test_a_state_that_is_not_its_own_is_refused(
    make: Callable[[FCRNLoss], Any], state: dict[str, Any]
) -> None:
    schedule = make(FCRNLoss())
    before = schedule.state_dict()
    with pytest.raises(KeyError):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before


BAD_STEP = [
    ("initial", -0.1),
    ("initial", math.nan),
    ("initial", math.inf),
    ("final", -1.0),
    ("final", math.nan),
    ("final", math.inf),
    ("gamma", 0.0),
    ("gamma", -1.05),
    ("gamma", math.nan),
    ("gamma", math.inf),
    ("step_size", 0),
    ("step_size", -100),
]
BAD_LINEAR = [
    *[bad for bad in BAD_STEP if bad[0] in ("initial", "final")],
    ("total_iters", 0),
    ("total_iters", -5),
]


@pytest.mark.parametrize(("name", "value"), BAD_STEP)
def test_step_refuses(name: str, value: float) -> None:
    loss = FCRNLoss(negative_weight=0.5)
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        StepNegativeWeight(loss, **{name: value})
    assert filled(loss) == 0.5, "nothing is written"


@pytest.mark.parametrize(("name", "value"), BAD_LINEAR)
def test_linear_refuses(name: str, value: float) -> None:
    loss = FCRNLoss(negative_weight=0.5)
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        LinearNegativeWeight(loss, **{"total_iters": 10, name: value})
    assert filled(loss) == 0.5, "nothing is written"


@each_schedule
def test_only_an_fcrn_loss_is_annealed(make: Callable[[FCRNLoss], Any]) -> None:
    with pytest.raises(TypeError, match="MSELoss"):
        make(torch.nn.MSELoss())  # type: ignore[arg-type]


BAD_TYPES = [
    *((name, value) for name in ("initial", "final") for value in ("0.01", None, [0.1])),
    ("gamma", "2"),
    ("step_size", "100"),
    ("step_size", 100.0),
]


@pytest.mark.parametrize(("name", "value"), BAD_TYPES)
def test_what_is_no_number_is_a_type_error(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}.*{type(value).__name__}"):
        StepNegativeWeight(FCRNLoss(), **{name: value})


BAD_LAST_STEP = [
    ("last_step", -1, ValueError),
    ("last_step", 1.0, TypeError),
    ("last_step", "1", TypeError),
    ("last_step", None, TypeError),
]
BAD_STATES = [
    *((StepNegativeWeight, name, value, ValueError) for name, value in BAD_STEP),
    *((StepNegativeWeight, name, value, TypeError) for name, value in BAD_TYPES),
    *((StepNegativeWeight, *bad) for bad in BAD_LAST_STEP),
    *((LinearNegativeWeight, name, value, ValueError) for name, value in BAD_LINEAR),
    *((LinearNegativeWeight, *bad) for bad in BAD_LAST_STEP),
]


@pytest.mark.parametrize(("kind", "name", "value", "error"), BAD_STATES, ids=str)
def test_a_state_is_checked_as_the_constructor_checks_and_changes_nothing(
    kind: type, name: str, value: Any, error: type[Exception]
) -> None:
    settings = {"total_iters": 10} if kind is LinearNegativeWeight else {}
    schedule = kind(FCRNLoss(), initial=0.5, **settings)
    before = schedule.state_dict()
    shown = value if error is ValueError else type(value).__name__
    with pytest.raises(error, match=rf"{name}.*{shown}"):
        schedule.load_state_dict({**before, "final": 0.75, "last_step": 1, name: value})
    assert schedule.state_dict() == before
    assert filled(schedule.loss) == 0.5


def test_a_state_of_numpy_numbers_is_taken_as_plain_values() -> None:
    schedule = StepNegativeWeight(FCRNLoss())
    state = {**schedule.state_dict(), "last_step": np.int64(3), "initial": np.float64(0.5)}
    schedule.load_state_dict(state)
    assert schedule.last_step == 3
    assert filled(schedule.loss) == 0.5
    assert all(type(value) in (int, float) for value in schedule.state_dict().values())


class LossWithParameter(FCRNLoss):
    """DistributedDataParallel takes only modules that have parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process as the only one of a group."""
    if not torch.distributed.is_available():
        pytest.skip("PyTorch without torch.distributed")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[FCRNLoss], torch.nn.Module]] = {
    "compile": torch.compile,
    "DataParallel": torch.nn.DataParallel,
    "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
    "compile of DataParallel": lambda loss: torch.compile(torch.nn.DataParallel(loss)),
    "DistributedDataParallel of compile": lambda loss: torch.nn.parallel.DistributedDataParallel(
        torch.compile(loss)
    ),
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


@each_schedule
@each_wrapper
def test_a_wrapped_loss_is_annealed(
    process_group: None,
    wrap: Callable[[FCRNLoss], torch.nn.Module],
    make: Callable[[Any], Any],
) -> None:
    loss = LossWithParameter()
    schedule = make(wrap(loss))
    assert schedule.loss is loss
    for _ in range(5):
        schedule.step()
    assert filled(loss) == pytest.approx(schedule.get_last_weight())
    assert filled(loss) > 0.01


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (torch.compile(torch.nn.MSELoss()), "MSELoss"),
        (torch.nn.DataParallel(torch.nn.MSELoss()), "MSELoss"),
        (torch.nn.Sequential(FCRNLoss()), "Sequential"),
        (FCRNLoss, "type"),
        (fcrn_fused.fcrn_loss, "function"),
        (None, "NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@each_schedule
def test_what_is_not_an_fcrn_loss_is_refused_by_its_type(
    make: Callable[[Any], Any], loss: Any, name: str
) -> None:
    with pytest.raises(TypeError, match=f"FCRNLoss.*{name}"):
        make(loss)


def test_total_iters_has_no_default() -> None:
    with pytest.raises(TypeError, match="total_iters"):
        LinearNegativeWeight(FCRNLoss())


def test_a_schedule_reaches_a_loss_that_was_moved_and_cast() -> None:
    loss = FCRNLoss()
    schedule = StepNegativeWeight(loss, step_size=1, gamma=2.0)
    loss.half()
    schedule.step()
    assert filled(loss) == pytest.approx(0.02)
    assert filled(loss) == torch.tensor(0.02).item(), "float32, not float16"


def test_in_a_training_loop_the_loss_sees_each_weight() -> None:
    loss = fcrn_fused.FCRNLoss(reduction="sum")
    schedule = StepNegativeWeight(loss, initial=0.25, gamma=2.0, step_size=2)
    pred, target = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    seen = []
    for _ in range(6):
        seen.append(loss(pred, target).item())
        schedule.step()
    assert seen == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
