"""Schedules that anneal the weight of negative cells while a network trains."""

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
    """The settings and the step of a schedule, as plain Python values."""
    return {name: _CHECKS[name](name, value) for name, value in state.items()}


def _unwrapped(loss: nn.Module) -> FCRNLoss:
    """The `FCRNLoss` in the wrappers of torch.compile and of data parallelism."""
    inner: Any = loss
    while not isinstance(inner, FCRNLoss):
        if isinstance(inner, (DataParallel, DistributedDataParallel)):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):  # torch.compile's OptimizedModule, a private class
            inner = inner._orig_mod
        else:
            raise TypeError(f"loss must be an FCRNLoss, got {type(inner).__name__}")
    return inner


class _NegativeWeightSchedule:
    """What the schedules share; a subclass defines the weight after `last_step` steps.

    The weight is filled in place, so that a captured CUDA graph and a compiled step see it.
    """

    last_step: int

    def __init__(self, loss: nn.Module, **settings: Any) -> None:
        self.loss = _unwrapped(loss)
        vars(self).update(_checked({**settings, "last_step": 0}))
        self._fill()

    def _weight(self) -> float:
        raise NotImplementedError

    def step(self) -> None:
        """Advance by one step and fill the weight; call it once per iteration."""
        self.last_step += 1
        self._fill()

    def get_last_weight(self) -> float:
        """The weight as it was filled last, a Python number (no synchronisation)."""
        return self._weight()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the loss, in plain Python values (loads with `weights_only=True`)."""
        return {name: value for name, value in vars(self).items() if name != "loss"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the settings and the step of `state_dict`, and fill the weight.

        Raises:
            KeyError: a value is missing, or is not one of this schedule's.
            TypeError, ValueError: a value that the constructor refuses, or a `last_step` that is
                not an integer or is negative. Nothing is changed.
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

    Fills `loss.negative_weight` in place, from construction on. With the defaults the weight
    starts at 0.01, grows by 5 % every 100 iterations and reaches 1 after 9,500 (the authors'
    reply in ankush-me/SynthText, issue 20, for batches of 16 images).

    Args:
        loss: the `FCRNLoss` to anneal, also one wrapped by `torch.compile`, `DataParallel` or
            `DistributedDataParallel`.
        initial: weight at the start, finite and not negative.
        gamma: factor of growth, positive and finite.
        step_size: number of steps from one growth to the next, at least 1.
        final: the weight is never above this; finite and not negative.

    Raises:
        TypeError: `loss` is not an `FCRNLoss`, or a value is not a number.
        ValueError: a value out of the ranges above, which the message names.
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
        except OverflowError:  # the power left the range of a float: far above `final`
            weight = math.inf if self.initial > 0 else 0.0
        return min(self.final, weight)


class LinearNegativeWeight(_NegativeWeightSchedule):
    """A weight that goes from `initial` to `final` in equal steps, and stays there.

    Fills `loss.negative_weight` in place, from construction on.

    Args:
        loss: the `FCRNLoss` to anneal, also one wrapped by `torch.compile`, `DataParallel` or
            `DistributedDataParallel`.
        initial: weight at the start, finite and not negative.
        final: weight after `total_iters` steps, finite and not negative.
        total_iters: number of steps, at least 1.

    Raises:
        TypeError: `loss` is not an `FCRNLoss`, or a value is not a number.
        ValueError: a value out of the ranges above, which the message names.
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
