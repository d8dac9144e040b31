"""Schedules that anneal the weight of negative cells while a network trains."""

from __future__ import annotations

import math
from typing import Any

from .module import FCRNLoss


class _NegativeWeightSchedule:
    """What the schedules share; a subclass says what the weight is after `last_step` steps.

    The weight is filled in place, so that a captured CUDA graph and a compiled step see it.
    """

    def __init__(self, loss: FCRNLoss) -> None:
        if not isinstance(loss, FCRNLoss):
            raise TypeError(f"loss must be an FCRNLoss, got {type(loss).__name__}")
        self.loss = loss
        self.last_step = 0
        self._fill()

    def _weight(self) -> float:
        raise NotImplementedError

    def _fill(self) -> None:
        self.loss.negative_weight.fill_(self._weight())

    def step(self) -> None:
        """Go on by one step, once an iteration after the optimiser's, and fill the weight."""
        self.last_step += 1
        self._fill()

    def get_last_weight(self) -> float:
        """The weight as it was filled last, a Python number (no synchronisation)."""
        return self._weight()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the loss, in plain Python values (loads with `weights_only=True`)."""
        return {name: value for name, value in vars(self).items() if name != "loss"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of `state_dict` and fill the weight that belongs to it.

        Raises:
            KeyError: a value is missing, or one is not of this schedule.
        """
        wanted = self.state_dict().keys()
        if state_dict.keys() != wanted:
            raise KeyError(
                f"state_dict must hold {', '.join(sorted(wanted))}, "
                f"got {', '.join(sorted(map(str, state_dict)))}"
            )
        vars(self).update(state_dict)
        self._fill()


class StepNegativeWeight(_NegativeWeightSchedule):
    """The schedule of FCRN's authors: `min(final, initial * gamma ** (steps // step_size))`.

    Fills `loss.negative_weight` in place, from construction on. With the defaults the weight
    starts at 0.01, grows by 5 % every 100 iterations and reaches 1 after 9,500 (the authors'
    reply in ankush-me/SynthText, issue 20, for batches of 16 images).

    Args:
        loss: the `FCRNLoss` to anneal.
        initial: weight at the start, finite and not negative.
        gamma: factor of growth, positive and finite.
        step_size: number of steps from one growth to the next, at least 1.
        final: the weight is never above this; finite and not negative.

    Raises:
        ValueError: a value out of the ranges above, which the message names.
    """

    def __init__(
        self,
        loss: FCRNLoss,
        *,
        initial: float = 0.01,
        gamma: float = 1.05,
        step_size: int = 100,
        final: float = 1.0,
    ) -> None:
        self.initial = _finite("initial", initial)
        self.gamma = _finite("gamma", gamma, positive=True)
        self.step_size = _count("step_size", step_size)
        self.final = _finite("final", final)
        super().__init__(loss)

    def _weight(self) -> float:
        try:
            weight = self.initial * self.gamma ** (self.last_step // self.step_size)
        except OverflowError:  # the power left the range of a float: far above `final`
            weight = math.inf if self.initial > 0 else 0.0
        return min(self.final, weight)


class LinearNegativeWeight(_NegativeWeightSchedule):
    """A weight that goes from `initial` to `final` in equal steps, and stays there.

    Fills `loss.negative_weight` in place, from construction on.

    Args:
        loss: the `FCRNLoss` to anneal.
        initial: weight at the start, finite and not negative.
        final: weight after `total_iters` steps, finite and not negative.
        total_iters: number of steps, at least 1.

    Raises:
        ValueError: a value out of the ranges above, which the message names.
    """

    def __init__(
        self, loss: FCRNLoss, *, initial: float = 0.01, final: float = 1.0, total_iters: int
    ) -> None:
        self.initial = _finite("initial", initial)
        self.final = _finite("final", final)
        self.total_iters = _count("total_iters", total_iters)
        super().__init__(loss)

    def _weight(self) -> float:
        if self.last_step >= self.total_iters:
            return self.final
        return self.initial + (self.final - self.initial) * (self.last_step / self.total_iters)


def _finite(name: str, value: float, *, positive: bool = False) -> float:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        kind = "positive" if positive else "not negative"
        raise ValueError(f"{name} must be finite and {kind}, got {value}")
    return number


def _count(name: str, value: int) -> int:
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    number = value.__index__()
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return number
