"""Schedules that anneal the weight of negative cells during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .module import FCRNLoss
from .validation import check_weight


def _check_positive(name: str, value: float) -> float:
    number = check_weight(name, value)
    if number == 0:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def _check_count(name: str, value: int, *, at_least: int) -> int:
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    number = value.__index__()
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    return number


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "initial": check_weight,
    "final": check_weight,
    "gamma": _check_positive,
    "step_size": partial(_check_count, at_least=1),
    "total_iters": partial(_check_count, at_least=1),
    "last_step": partial(_check_count, at_least=0),
}


def _checked(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and the step of a schedule, checked, as plain Python values."""
    return {name: _CHECKS[name](name, value) for name, value in state.items()}


def _unwrapped(loss: nn.Module) -> FCRNLoss:
    """The `FCRNLoss` inside wrappers of torch.compile and data parallelism."""
    inner: Any = loss
    while not isinstance(inner, FCRNLoss):
        if isinstance(inner, (DataParallel, DistributedDataParallel)):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):  # OptimizedModule of torch.compile, a private class
            inner = inner._orig_mod
        else:
            raise TypeError(f"loss must be an FCRNLoss, got {type(inner).__name__}")
    return inner


class _NegativeWeightSchedule:
    """Base class of the schedules. A subclass defines the weight after `last_step` steps.

    The weight is filled in place, so that captured CUDA graphs and compiled steps see it.
    """

    last_step: int

    def __init__(self, loss: nn.Module, **settings: Any) -> None:
        self.loss = _unwrapped(loss)
        vars(self).update(_checked({**settings, "last_step": 0}))
        self._fill()

    def _weight(self) -> float:
        raise NotImplementedError

    def step(self) -> None:
        """Advance by one step and fill the weight. Call this once per iteration."""
        self.last_step += 1
        self._fill()

    def get_last_weight(self) -> float:
        """The weight that was filled last, a Python float (no synchronisation)."""
        return self._weight()

    def state_dict(self) -> dict[str, Any]:
        """All attributes except the loss, plain Python values (loads with `weights_only=True`)."""
        return {name: value for name, value in vars(self).items() if name != "loss"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the settings and the step of `state_dict`, and fill the weight.

        Raises:
            KeyError: a key is missing or unexpected.
            TypeError, ValueError: the constructor would refuse a value, or `last_step` is not an
                integer or is negative. The schedule is then unchanged.
        """
        wanted = self.state_dict().keys()
        if state_dict.keys() != wanted:
            raise KeyError(
                f"state_dict must hold {', '.join(sorted(wanted))}, "
                f"got {', '.join(sorted(map(str, state_dict)))}"
            )
        vars(self).update(_checked(state_dict))
        self._fill()

    def _fill(self) -> None:
        self.loss.negative_weight.fill_(self._weight())


class StepNegativeWeight(_NegativeWeightSchedule):
    """The schedule of FCRN's authors: `min(final, initial * gamma ** (steps // step_size))`.

    Fills `loss.negative_weight` in place, from construction on. With the defaults, the weight
    starts at 0.01, grows by 5 % every 100 iterations and reaches 1 after 9,500 (as the authors
    describe for batches of 16 images in ankush-me/SynthText, issue 20).

    Args:
        loss: the `FCRNLoss` to anneal, also one wrapped by `torch.compile`, `DataParallel` or
            `DistributedDataParallel`.
        initial: weight at the start, finite and not negative.
        gamma: factor of growth, positive and finite.
        step_size: number of steps between growths, at least 1.
        final: upper bound of the weight, finite and not negative.

    Raises:
        TypeError: `loss` is not an `FCRNLoss`, or a value is not a number.
        ValueError: a value is out of the range given above.
    """

    initial: float
    gamma: float
    step_size: int
    final: float

    def __init__(
        self,
        loss: nn.Module,
        *,
        initial: float = 0.01,
        gamma: float = 1.05,
        step_size: int = 100,
        final: float = 1.0,
    ) -> None:
        super().__init__(loss, initial=initial, gamma=gamma, step_size=step_size, final=final)

    def _weight(self) -> float:
        try:
            weight = self.initial * self.gamma ** (self.last_step // self.step_size)
        except OverflowError:  # far above `final`
            weight = math.inf if self.initial > 0 else 0.0
        return min(self.final, weight)


class LinearNegativeWeight(_NegativeWeightSchedule):
    """A weight that goes from `initial` to `final` in `total_iters` equal steps and stays there.

    Fills `loss.negative_weight` in place, from construction on.

    Args:
        loss: the `FCRNLoss` to anneal, also one wrapped by `torch.compile`, `DataParallel` or
            `DistributedDataParallel`.
        initial: weight at the start, finite and not negative.
        final: weight after `total_iters` steps, finite and not negative.
        total_iters: number of steps, at least 1.

    Raises:
        TypeError: `loss` is not an `FCRNLoss`, or a value is not a number.
        ValueError: a value is out of the range given above.
    """

    initial: float
    final: float
    total_iters: int

    def __init__(
        self, loss: nn.Module, *, initial: float = 0.01, final: float = 1.0, total_iters: int
    ) -> None:
        super().__init__(loss, initial=initial, final=final, total_iters=total_iters)

    def _weight(self) -> float:
        if self.last_step >= self.total_iters:
            return self.final
        return self.initial + (self.final - self.initial) * (self.last_step / self.total_iters)
