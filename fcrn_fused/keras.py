"""The loss for Keras 3 on its PyTorch backend: `FCRNLoss` and `NegativeWeightCallback`.

Nothing else in the package imports Keras. Choose the backend before Keras is imported, with
`KERAS_BACKEND=torch` in the environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import module
from .functional import loss_by_rule
from .schedule import LinearNegativeWeight, StepNegativeWeight

try:
    import keras  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise
    raise ModuleNotFoundError(
        "fcrn_fused.keras needs Keras 3: pip install keras", name="keras"
    ) from error

__all__ = ["FCRNLoss", "NegativeWeightCallback"]

_DATA_FORMATS = ("channels_first", "channels_last")
# Keras's names of the reductions that the kernels compute. Keras itself computes
# "mean_with_sample_weight", which divides by the sum of the weights before they are broadcast.
_SCALAR_REDUCTIONS = {"sum_over_batch_size": "mean", "mean": "mean", "sum": "sum"}


@keras.saving.register_keras_serializable(package="fcrn_fused")
class FCRNLoss(keras.losses.Loss):  # type: ignore[misc]  # Keras has no types
    """`fcrn_fused.fcrn_loss` as a Keras loss.

    Keras reduces the mean over the maps of each cell, (B, *S), so the default reduction gives the
    loss of `reduction="mean"`. A `sample_weight` has one weight for each image, (B,), or for each
    cell, (B, *S). With "sum_over_batch_size", "mean" and "sum" it becomes the `weight` of
    `fcrn_loss`, so that a cell of weight 0 is masked, and the kernel reduces.

    `get_config` holds the current weight of negative cells: a model that is saved during training
    and loaded again continues with it.

    Args:
        negative_weight, positive_weight, coord_weight, ignore_value, backend: as in `fcrn_loss`.
        data_format: "channels_first" for maps (B, C, *S), "channels_last" for (B, *S, C); both are
            read in place. None takes `keras.config.image_data_format()`.
        reduction: "sum_over_batch_size", "sum", "mean", "mean_with_sample_weight" or None, as in
            `keras.losses.Loss`.
        name, dtype: as in `keras.losses.Loss`.

    Raises:
        RuntimeError: Keras runs on another backend than PyTorch.
        TypeError: a weight is not a number.
        ValueError: a weight, `ignore_value`, `data_format`, `reduction` or `backend` is not valid.
    """

    def __init__(
        self,
        *,
        negative_weight: float | Tensor = 1.0,
        positive_weight: float = 1.0,
        coord_weight: float | Sequence[float] | Tensor = 1.0,
        ignore_value: float | None = None,
        data_format: str | None = None,
        backend: str = "auto",
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "fcrn_loss",
        dtype: Any = None,
    ) -> None:
        running = keras.config.backend()
        if running != "torch":
            raise RuntimeError(
                f"fcrn_fused.keras needs Keras on PyTorch, this is Keras on {running}; set "
                "KERAS_BACKEND=torch in the environment before keras is imported"
            )
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        data_format = data_format or keras.config.image_data_format()
        if data_format not in _DATA_FORMATS:
            raise ValueError(
                f"data_format must be one of {', '.join(_DATA_FORMATS)}, got {data_format!r}"
            )
        self.data_format = data_format
        self.module = module.FCRNLoss(
            negative_weight=negative_weight,
            positive_weight=positive_weight,
            coord_weight=coord_weight,
            ignore_value=ignore_value,
            reduction="cell",
            backend=backend,
        )
        """The PyTorch module, for schedules: `StepNegativeWeight(loss.module)`."""

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Tensor:
        """The reduced loss of `y_true` and `y_pred`, both in `data_format`.

        `sample_weight` is a number or has the shape (B,), (B, *S) or (B, *S, 1); its dimensions may
        be 1, and its last ones may be missing.

        Raises:
            ValueError: `sample_weight` has another shape.
        """
        if sample_weight is not None:
            sample_weight = keras.ops.convert_to_tensor(sample_weight, dtype=self.dtype)
            if not hasattr(y_pred, "shape"):  # a list
                y_pred = keras.ops.convert_to_tensor(y_pred, dtype=self.dtype)
            sample_weight = self._for_cells(sample_weight, tuple(y_pred.shape))
        reduction = _SCALAR_REDUCTIONS.get(self.reduction)
        if reduction is None or getattr(y_pred, "_keras_mask", None) is not None:
            loss: Tensor = super().__call__(y_true, y_pred, sample_weight)
            return loss
        y_true, y_pred = (
            keras.ops.convert_to_tensor(maps, dtype=self.dtype) for maps in (y_true, y_pred)
        )
        if sample_weight is not None and sample_weight.ndim > 0:
            sample_weight = sample_weight.unsqueeze(1)
        return self._loss(y_true, y_pred, reduction, sample_weight)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each cell, (B, *S); the maps are in `data_format`."""
        return self._loss(y_true, y_pred, "cell")

    def _for_cells(self, sample_weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The weight with the dimensions of the cells of maps of `shape`, or a 0-dim one.

        Keras would align a smaller one with the last dimensions of (B, *S), and broadcast the
        losses to a larger one.
        """
        cells = shape[:-1] if self.data_format == "channels_last" else (shape[0], *shape[2:])
        given = tuple(sample_weight.shape)
        if len(given) == len(cells) + 1 and given[-1] == 1:
            sample_weight = sample_weight.squeeze(-1)
        elif 0 < len(given) < len(cells):
            sample_weight = sample_weight.reshape(*given, *(1,) * (len(cells) - len(given)))
        if sample_weight.ndim == 0:
            return sample_weight
        sizes = tuple(sample_weight.shape)
        if len(sizes) != len(cells) or any(
            size not in (1, wanted) for size, wanted in zip(sizes, cells, strict=True)
        ):
            raise ValueError(
                f"sample_weight must have one weight for each image, shape ({shape[0]},), or for "
                f"each cell, shape {cells}, got shape {given}"
            )
        return sample_weight

    def _loss(
        self, y_true: Tensor, y_pred: Tensor, reduction: str, weight: Tensor | None = None
    ) -> Tensor:
        if self.data_format == "channels_last":
            y_true, y_pred = y_true.movedim(-1, 1), y_pred.movedim(-1, 1)
        rule = self.module._rule(reduction, weight)
        loss = loss_by_rule(y_pred, y_true, rule, False, self.module.backend)
        assert isinstance(loss, Tensor)
        # Keras sums the means over the maps.
        return loss / y_pred.shape[1] if reduction == "sum" else loss

    def get_config(self) -> dict[str, Any]:
        """Plain values for `from_config`, with the current negative weight."""
        return {
            **super().get_config(),
            "dtype": self.dtype,
            "negative_weight": self.module.negative_weight.item(),
            "positive_weight": self.module.positive_weight,
            "coord_weight": _plain(self.module.coord_weight),
            "ignore_value": self.module.ignore_value,
            "data_format": self.data_format,
            "backend": self.module.backend,
        }


class NegativeWeightCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Steps a schedule of the negative weight after each training batch.

    The weight follows the number of the epoch. A new schedule (`last_step` is 0) that meets a
    training resumed at epoch k, by `fit(initial_epoch=k)` or by `BackupAndRestore`, is first
    stepped k times the number of batches of an epoch. Where Keras repeats an interrupted epoch,
    the weight is therefore that of the start of that epoch, also if `save_freq` is a number of
    batches. A schedule that has taken a step, or whose state was loaded, continues from its own
    `last_step`.

    Every batch is one step, with `gradient_accumulation_steps` too.

    Adds the weight to the logs of each epoch as "negative_weight", for `History` and for a
    `CSVLogger` that comes later in the list of callbacks.

    Args:
        schedule: `StepNegativeWeight` or `LinearNegativeWeight` over `loss.module`, or anything
            with `step()` and `get_last_weight()`. One without `last_step` is never taken to a
            later epoch.

    Raises:
        TypeError: `schedule` has no such methods.
        ValueError: at the start of a resumed training with a new schedule, if Keras does not know
            the number of batches of an epoch, as with a generator without `steps_per_epoch`.
    """

    def __init__(self, schedule: StepNegativeWeight | LinearNegativeWeight) -> None:
        super().__init__()
        if not (hasattr(schedule, "step") and hasattr(schedule, "get_last_weight")):
            raise TypeError(
                "schedule must be a StepNegativeWeight or LinearNegativeWeight over loss.module, "
                f"got {type(schedule).__name__}"
            )
        self.schedule = schedule

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Take a new schedule to the start of `epoch`."""
        # Not in on_train_begin, where BackupAndRestore may not have restored the epoch yet.
        if epoch == 0 or getattr(self.schedule, "last_step", None) != 0:
            return
        batches = (self.params or {}).get("steps")
        if batches is None:
            raise ValueError(
                f"training resumes at epoch {epoch} with a new schedule, and Keras does not know "
                "how many batches an epoch has; pass steps_per_epoch to fit, or load the "
                "schedule's state_dict"
            )
        for _ in range(epoch * batches):
            self.schedule.step()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Advance the schedule by one step."""
        self.schedule.step()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the weight to the logs."""
        if logs is not None:
            logs["negative_weight"] = self.schedule.get_last_weight()


def _plain(weight: float | tuple[float, ...] | Tensor) -> float | list[float]:
    if isinstance(weight, Tensor):
        values: float | list[float] = weight.tolist()
        return values
    return list(weight) if isinstance(weight, tuple) else weight
