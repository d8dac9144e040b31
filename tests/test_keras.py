"""`fcrn_fused.keras`: the loss and the callback in Keras 3 on its PyTorch backend."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import make_batch

import fcrn_fused
from fcrn_fused.functional import loss_by_rule

if importlib.util.find_spec("keras") is None:
    pytest.skip("needs Keras: pip install keras", allow_module_level=True)
os.environ.setdefault("KERAS_BACKEND", "torch")
import keras

if keras.config.backend() != "torch":
    pytest.skip(
        f"needs Keras on torch (KERAS_BACKEND=torch), this is {keras.config.backend()}",
        allow_module_level=True,
    )
from fcrn_fused.keras import FCRNLoss, NegativeWeightCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",  # Keras's own, under NumPy 2
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)
SETTINGS: dict[str, Any] = {
    "negative_weight": 0.25,
    "positive_weight": 1.5,
    "coord_weight": (1.0, 2.0, 0.5, 1.0, 1.0, 3.0),
    "ignore_value": -1.0,
}


def keras_batch(data_format: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`(pred, target)` on Keras's own device, as layers would give them."""
    pred, target = make_batch((4, 7, 5, 6), ignored=0.1, requires_grad=False, **options)
    device = keras.ops.convert_to_tensor(0.0).device
    pred, target = pred.to(device), target.to(device)
    if data_format == "channels_last":
        pred, target = (x.movedim(1, -1).contiguous() for x in (pred, target))
    return pred, target


PICTURES = np.random.default_rng(0).random((12, 4, 4, 3), dtype=np.float32)
TARGET = np.zeros((12, 4, 4, 7), dtype=np.float32)
TARGET[:, 1, 2] = [0.1, -0.2, 0.5, 0.2, 1.0, 0.0, 1.0]


def model_and_schedule(**optimizer: Any) -> tuple[Any, fcrn_fused.LinearNegativeWeight]:
    """A compiled model for PICTURES and a new schedule of its loss."""
    keras.utils.set_random_seed(0)
    head = keras.layers.Conv2D(7, 1, data_format="channels_last")
    model = keras.Sequential([keras.Input((4, 4, 3)), head])
    loss = FCRNLoss(data_format="channels_last")
    model.compile(optimizer=keras.optimizers.SGD(0.01, **optimizer), loss=loss)
    return model, fcrn_fused.LinearNegativeWeight(loss.module, total_iters=30)


def as_channels_first(x: torch.Tensor, data_format: str) -> torch.Tensor:
    return x.movedim(-1, 1) if data_format == "channels_last" else x


both_formats = pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])


@both_formats
@pytest.mark.parametrize(
    ("reduction", "of_cells"),
    [
        ("sum_over_batch_size", torch.mean),
        ("sum", torch.sum),
        ("mean", torch.mean),
        (None, lambda x: x),
    ],
)
def test_it_is_the_loss_of_the_cells_and_keras_reduces(
    data_format: str, reduction: str | None, of_cells: Any
) -> None:
    pred, target = keras_batch(data_format)
    loss = FCRNLoss(**SETTINGS, data_format=data_format, reduction=reduction)(target, pred)
    maps = (as_channels_first(x, data_format) for x in (pred, target))
    cells = fcrn_fused.fcrn_loss(*maps, **SETTINGS, reduction="cell")
    torch.testing.assert_close(loss, of_cells(cells))


@both_formats
def test_the_default_reduction_is_the_mean_of_fcrn_loss(data_format: str) -> None:
    pred, target = keras_batch(data_format)
    pred.requires_grad_()
    loss = FCRNLoss(data_format=data_format)(target, pred)
    maps = [as_channels_first(x, data_format) for x in (pred, target)]
    want = fcrn_fused.fcrn_loss(*maps)
    torch.testing.assert_close(loss, want)
    gradients = [torch.autograd.grad(x, pred)[0] for x in (loss, want)]
    torch.testing.assert_close(*gradients)


def test_the_data_format_is_that_of_keras() -> None:
    before = keras.config.image_data_format()
    try:
        for data_format in ("channels_first", "channels_last"):
            keras.config.set_image_data_format(data_format)
            assert FCRNLoss().data_format == data_format
    finally:
        keras.config.set_image_data_format(before)


def test_channels_last_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, target = keras_batch("channels_last")
    loss = FCRNLoss(data_format="channels_last")
    seen: list[torch.Tensor] = []

    def look(pred: torch.Tensor, target: torch.Tensor, *rest: Any) -> Any:
        seen.extend([pred, target])
        return loss_by_rule(pred, target, *rest)

    monkeypatch.setattr("fcrn_fused.keras.loss_by_rule", look)
    loss(target, pred)
    assert [x.data_ptr() for x in seen] == [pred.data_ptr(), target.data_ptr()]
    assert all(x.shape == (4, 7, 5, 6) for x in seen)


@both_formats
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 5, 6), (4, 5), ()], ids=str)
def test_sample_weight_of_pictures_and_of_cells(data_format: str, shape: tuple[int, ...]) -> None:
    pred, target = keras_batch(data_format)
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(1)).numpy()
    loss = FCRNLoss(data_format=data_format)(target, pred, sample_weight=weight)
    maps = (as_channels_first(x, data_format) for x in (pred, target))
    cells = fcrn_fused.fcrn_loss(*maps, reduction="cell").cpu()
    for_cells = weight.reshape(shape + (1,) * (3 - len(shape))) if shape else weight
    torch.testing.assert_close(loss.cpu(), (cells * torch.as_tensor(for_cells)).mean())


def test_a_batch_as_wide_as_long_is_weighed_by_picture() -> None:
    """(B,) against (B, H, W) with W = B: lined up with W it would pass, and be wrong."""
    pred, target = torch.ones(4, 4, 4, 7), torch.zeros(4, 4, 4, 7)
    pred[0, :, :, 6] = 3
    weight = np.array([1, 0, 0, 0], dtype=np.float32)
    loss = FCRNLoss(data_format="channels_last", reduction="sum")(target, pred, weight)
    assert loss.item() == pytest.approx(16 * 9 / 7)


@both_formats
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", None])
@pytest.mark.parametrize("shape", [(1,), (1, 5, 6), (4, 1, 6), (4, 5, 6, 1)], ids=str)
def test_a_sample_weight_may_have_dimensions_of_1(
    data_format: str, reduction: str | None, shape: tuple[int, ...]
) -> None:
    pred, target = keras_batch(data_format)
    loss = FCRNLoss(data_format=data_format, reduction=reduction)
    got = loss(target, pred, sample_weight=np.full(shape, 0.5))
    cells = 0.5 * loss.call(target, pred)
    want = {
        "sum_over_batch_size": cells.mean(),
        "mean_with_sample_weight": cells.sum() / (0.5 * np.prod(shape)),
        None: cells,
    }
    torch.testing.assert_close(got, want[reduction])


@both_formats
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", None])
@pytest.mark.parametrize(
    "shape",
    [(3,), (0,), (6,), (4, 6), (5, 6), (4, 5, 7), (4, 7, 5, 6), (4, 5, 6, 7), (4, 1, 5, 6)],
    ids=str,
)
def test_a_sample_weight_of_another_shape_is_refused_by_name(
    data_format: str, reduction: str | None, shape: tuple[int, ...]
) -> None:
    pred, target = keras_batch(data_format)
    loss = FCRNLoss(data_format=data_format, reduction=reduction)
    wanted = r"sample_weight must .* shape \(4,\), .* shape \(4, 5, 6\), got shape "
    with pytest.raises(ValueError, match=wanted + re.escape(str(shape))):
        loss(target, pred, sample_weight=np.ones(shape))


def test_fit_names_the_sample_weight_that_it_refuses() -> None:
    model, _ = model_and_schedule()
    with pytest.raises(
        ValueError, match=r"sample_weight must .*\(4, 4, 4\), got shape \(4, 4, 5\)"
    ):
        model.fit(PICTURES, TARGET, sample_weight=np.ones((12, 4, 5)), batch_size=4, verbose=0)


def test_numpy_and_half_inputs() -> None:
    pred, target = (x.cpu().numpy() for x in keras_batch("channels_last"))
    loss = FCRNLoss(data_format="channels_last")
    assert loss(target, pred).dtype == torch.float32
    half = FCRNLoss(data_format="channels_last", dtype="bfloat16")
    assert loss(target, pred).item() == pytest.approx(half(target, pred).item(), rel=0.02)


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize("coord_weight", [2.0, (1.0, 2.0), torch.tensor([1.0, 2.0])], ids=str)
def test_the_config_makes_the_same_loss_again(coord_weight: Any) -> None:
    settings = {**SETTINGS, "coord_weight": coord_weight, "data_format": "channels_first"}
    loss = FCRNLoss(**settings, reduction="sum", name="mine", backend="reference", dtype="float64")
    config = loss.get_config()
    json.dumps(config)
    other = FCRNLoss.from_config(config)
    assert other.get_config() == config
    pred, target = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4).round()
    assert torch.equal(loss(target, pred), other(target, pred))
    through_keras = keras.losses.deserialize(keras.losses.serialize(loss))
    assert through_keras.get_config() == config


def test_the_config_holds_the_weight_of_now() -> None:
    loss = FCRNLoss()
    schedule = fcrn_fused.LinearNegativeWeight(loss.module, initial=0.25, total_iters=2)
    assert loss.get_config()["negative_weight"] == 0.25
    schedule.step()
    assert loss.get_config()["negative_weight"] == 0.625


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"data_format": "NCHW"}, ValueError, "data_format must be one of .*'NCHW'"),
        ({"reduction": "cell"}, ValueError, "cell"),
        ({"negative_weight": -1.0}, ValueError, "negative_weight must be finite"),
        ({"coord_weight": "2"}, TypeError, "coord_weight must be a number"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FCRNLoss(**settings)


def test_the_callback_wants_a_schedule() -> None:
    with pytest.raises(TypeError, match=r"over loss.module, got float"):
        NegativeWeightCallback(0.01)  # type: ignore[arg-type]


def test_shapes_that_differ_are_refused_by_name() -> None:
    loss = FCRNLoss(data_format="channels_last")
    with pytest.raises(ValueError, match="target must have the shape of pred"):
        loss(torch.zeros(2, 4, 4, 7), torch.zeros(2, 4, 5, 7))


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_two_epochs_saved_and_loaded(data_format: str, tmp_path: Path) -> None:
    pictures, target = (x.cpu() for x in keras_batch(data_format))
    pictures = pictures[..., :3] if data_format == "channels_last" else pictures[:, :3]
    keras.utils.set_random_seed(0)
    head = keras.layers.Conv2D(7, 3, padding="same", data_format=data_format)
    model = keras.Sequential([keras.Input(pictures.shape[1:]), head])
    loss = FCRNLoss(data_format=data_format, ignore_value=-1.0)
    schedule = fcrn_fused.LinearNegativeWeight(loss.module, initial=0.5, total_iters=8)
    model.compile(optimizer=keras.optimizers.SGD(0.05), loss=loss)
    weights = np.array([1.0, 0.5, 1.0, 2.0])
    history = model.fit(
        pictures.numpy(),
        target.numpy(),
        sample_weight=weights,
        batch_size=2,
        epochs=2,
        verbose=0,
        callbacks=[NegativeWeightCallback(schedule)],
    ).history
    assert schedule.last_step == 4
    assert history["negative_weight"] == pytest.approx([0.625, 0.75])
    assert loss.module.negative_weight.item() == 0.75
    assert all(np.isfinite(history["loss"]))
    assert history["loss"][1] < history["loss"][0]

    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert isinstance(loaded.loss, FCRNLoss)
    assert loaded.loss.get_config() == loss.get_config()
    np.testing.assert_array_equal(
        loaded.predict(pictures.numpy(), verbose=0), model.predict(pictures.numpy(), verbose=0)
    )
    assert loaded.evaluate(pictures.numpy(), target.numpy(), verbose=0) == pytest.approx(
        model.evaluate(pictures.numpy(), target.numpy(), verbose=0)
    )
    loaded.fit(pictures.numpy(), target.numpy(), verbose=0)  # goes on with optimiser and loss


# ---- training that goes on ----------------------------------------------------------------------

BATCHES = 3  # of an epoch


class Interrupt(keras.callbacks.Callback):  # type: ignore[misc]
    """Raises KeyboardInterrupt after a batch."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.at = (epoch, batch)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


def weights_of_fit(model: Any, *callbacks: Any, epochs: int = 5, **options: Any) -> list[float]:
    """The weight after each epoch."""
    history = model.fit(
        PICTURES,
        TARGET,
        batch_size=4,
        epochs=epochs,
        verbose=0,
        callbacks=list(callbacks),
        **options,
    ).history
    return list(history["negative_weight"])


@pytest.fixture(scope="module")
def whole_run() -> list[float]:
    model, schedule = model_and_schedule()
    weights = weights_of_fit(model, NegativeWeightCallback(schedule))
    assert schedule.last_step == 5 * BATCHES
    return weights


@pytest.mark.parametrize("at", [(0, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("save_freq", ["epoch", 2, 4])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_new_schedule_goes_on_where_backup_and_restore_does(
    whole_run: list[float], at: tuple[int, int], save_freq: Any, is_first: bool, tmp_path: Path
) -> None:
    def weights_of_process(*more: Any) -> tuple[list[float], int]:
        model, schedule = model_and_schedule()
        callbacks = [keras.callbacks.BackupAndRestore(tmp_path / "b", save_freq=save_freq)]
        callbacks.insert(0 if is_first else 1, NegativeWeightCallback(schedule))
        return weights_of_fit(model, *callbacks, *more), schedule.last_step

    with pytest.raises(KeyboardInterrupt):
        weights_of_process(Interrupt(*at))
    weights, last_step = weights_of_process()
    assert 1 <= len(weights) <= 5
    assert weights == whole_run[-len(weights) :]
    assert last_step == 5 * BATCHES


@pytest.mark.parametrize("optimizer", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_new_schedule_goes_on_at_the_initial_epoch(
    whole_run: list[float], optimizer: dict[str, Any], tmp_path: Path
) -> None:
    model, schedule = model_and_schedule(**optimizer)
    weights = weights_of_fit(model, NegativeWeightCallback(schedule), epochs=2)
    model.save(tmp_path / "model.keras")

    loaded = keras.saving.load_model(tmp_path / "model.keras")
    schedule = fcrn_fused.LinearNegativeWeight(loaded.loss.module, total_iters=30)
    weights += weights_of_fit(loaded, NegativeWeightCallback(schedule), initial_epoch=2)
    assert weights == whole_run
    assert schedule.last_step == 5 * BATCHES


@pytest.mark.parametrize("options", [{"initial_epoch": 2}, {"epochs": 3}], ids=str)
@pytest.mark.parametrize("is_new", [False, True], ids=["same callback", "new callback"])
def test_a_second_fit_goes_on(
    whole_run: list[float], options: dict[str, Any], is_new: bool
) -> None:
    model, schedule = model_and_schedule()
    callback = NegativeWeightCallback(schedule)
    weights = weights_of_fit(model, callback, epochs=2)
    if is_new:
        callback = NegativeWeightCallback(schedule)
    weights += weights_of_fit(model, callback, **options)
    assert weights == whole_run


def test_a_schedule_with_a_loaded_state_is_not_moved() -> None:
    model, schedule = model_and_schedule()
    schedule.load_state_dict({**schedule.state_dict(), "last_step": 7})
    weights_of_fit(model, NegativeWeightCallback(schedule), initial_epoch=3)
    assert schedule.last_step == 7 + 2 * BATCHES


def batches_of_unknown_number() -> Any:
    for first in range(0, 12, 4):
        yield PICTURES[first : first + 4], TARGET[first : first + 4]


def test_a_new_schedule_has_to_know_the_batches_of_an_epoch() -> None:
    model, schedule = model_and_schedule()
    callbacks = [NegativeWeightCallback(schedule)]
    options: dict[str, Any] = {"verbose": 0, "callbacks": callbacks, "initial_epoch": 2}
    options["shuffle"] = False
    with pytest.raises(ValueError, match=r"resumes at epoch 2 .* pass steps_per_epoch to fit"):
        model.fit(batches_of_unknown_number(), epochs=3, **options)
    model.fit(batches_of_unknown_number(), epochs=3, steps_per_epoch=BATCHES, **options)
    assert schedule.last_step == 3 * BATCHES


def test_a_schedule_without_a_last_step_is_only_stepped() -> None:
    class Count:
        steps = 0

        def step(self) -> None:
            self.steps += 1

        def get_last_weight(self) -> float:
            return float(self.steps)

    model, _ = model_and_schedule()
    callback = NegativeWeightCallback(Count())  # type: ignore[arg-type]
    assert weights_of_fit(model, callback, initial_epoch=3) == [BATCHES, 2 * BATCHES]


@pytest.mark.parametrize("negative_weight", [1.0, 0.5])
def test_a_loss_with_a_fixed_weight_as_a_metric(negative_weight: float) -> None:
    """The last batch is smaller, and counts for less."""
    model, _ = model_and_schedule()
    fixed = FCRNLoss(
        negative_weight=negative_weight,
        data_format="channels_last",
        reduction=None,
        name="fixed_weight",
    )
    model.compile(loss=model.loss, metrics=[fixed])
    got = model.evaluate(PICTURES, TARGET, batch_size=5, verbose=0, return_dict=True)
    want = fixed(TARGET, model.predict(PICTURES, verbose=0)).mean().item()
    assert got["fixed_weight"] == pytest.approx(want)


def test_early_stopping_on_val_loss_stops_while_the_network_gets_better() -> None:
    def history_of(*callbacks: Any) -> dict[str, list[float]]:
        model, _ = model_and_schedule()
        fixed = FCRNLoss(data_format="channels_last", reduction=None, name="fixed_weight")
        model.compile(keras.optimizers.Adam(0.003), loss=model.loss, metrics=[fixed])
        schedule = fcrn_fused.LinearNegativeWeight(model.loss.module, total_iters=40)
        history: dict[str, list[float]] = model.fit(
            PICTURES[:8],
            TARGET[:8],
            validation_data=(PICTURES[8:], TARGET[8:]),
            batch_size=4,
            epochs=24,
            verbose=0,
            callbacks=[NegativeWeightCallback(schedule), *callbacks],
        ).history
        return history

    whole = history_of()
    stopped = len(history_of(keras.callbacks.EarlyStopping(patience=2))["loss"])
    assert stopped < 20, "in the middle of the annealing"
    assert whole["val_loss"][-1] > min(whole["val_loss"][:stopped])
    assert whole["val_fixed_weight"][-1] < 0.8 * min(whole["val_fixed_weight"][:stopped])
    for other in (
        {"start_from_epoch": 20},
        {"monitor": "val_fixed_weight", "mode": "min"},
    ):
        stop = keras.callbacks.EarlyStopping(patience=2, **other)
        assert len(history_of(stop)["loss"]) == 24


@pytest.mark.slow
def test_jit_compile_trains_as_eager_does() -> None:
    pictures, target = (x.cpu().numpy() for x in keras_batch("channels_last"))
    losses = []
    for compiled in (False, True):
        keras.utils.set_random_seed(0)
        head = keras.layers.Conv2D(7, 3, padding="same")
        model = keras.Sequential([keras.Input(pictures.shape[1:]), head])
        loss = FCRNLoss(data_format="channels_last", ignore_value=-1.0)
        schedule = fcrn_fused.LinearNegativeWeight(loss.module, initial=0.5, total_iters=8)
        model.compile(optimizer=keras.optimizers.SGD(0.05), loss=loss, jit_compile=compiled)
        callbacks = [NegativeWeightCallback(schedule)]
        history = model.fit(
            pictures, target, batch_size=2, epochs=2, verbose=0, shuffle=False, callbacks=callbacks
        ).history
        assert schedule.last_step == 4
        losses.append(history["loss"])
    assert losses[0][1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean", "sum"])
@pytest.mark.parametrize("shape", [None, (4,), (4, 5, 6), ()], ids=str)
def test_the_kernel_reduces_as_keras_does(reduction: str, shape: tuple[int, ...] | None) -> None:
    """One number from the kernel, against cells that Keras weighs and reduces."""
    pred, target = keras_batch("channels_last")
    weight = (
        None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(1))
    )
    loss = FCRNLoss(data_format="channels_last", negative_weight=0.3, reduction=reduction)
    got = loss(target, pred, sample_weight=weight)
    cells = loss.call(target, pred)
    if weight is not None:
        cells = cells * (weight[:, None, None] if shape == (4,) else weight)
    want = cells.sum() if reduction == "sum" else cells.mean()
    torch.testing.assert_close(got, want)


def test_a_sample_weight_of_0_masks_nan() -> None:
    pred, target = keras_batch("channels_last")
    weight = torch.ones(4, 5, 6)
    weight[1:] = 0
    pred = pred.detach().clone()
    pred[1:] = torch.nan
    pred.requires_grad_()
    loss = FCRNLoss(data_format="channels_last")(target, pred, sample_weight=weight)
    loss.backward()
    assert loss.isfinite()
    assert pred.grad[1:].count_nonzero() == 0


def test_fit_reports_the_mean_of_fcrn_loss() -> None:
    pictures, target = (x.cpu() for x in keras_batch("channels_last"))
    head = keras.layers.Conv2D(7, 1, data_format="channels_last")
    model = keras.Sequential([keras.Input(pictures.shape[1:]), head])
    model.compile(loss=FCRNLoss(negative_weight=0.1, data_format="channels_last"))
    reported = model.evaluate(pictures.numpy(), target.numpy(), batch_size=4, verbose=0)
    pred = torch.as_tensor(model.predict(pictures.numpy(), verbose=0)).movedim(-1, 1)
    want = fcrn_fused.fcrn_loss(pred, target.movedim(-1, 1), negative_weight=0.1)
    assert reported == pytest.approx(want.item())


# ---- where Keras is not as it should be ---------------------------------------------------------


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_another_backend_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="this is Keras on jax; set KERAS_BACKEND=torch"):
        FCRNLoss()


def test_without_keras_the_package_works_and_the_module_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['keras'] = None\n"
        "import fcrn_fused\n"
        "try: import fcrn_fused.keras\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert "pip install keras" in run(code)


def test_the_package_does_not_import_keras() -> None:
    assert run("import sys, fcrn_fused; print('keras' in sys.modules)").strip() == "False"


def test_lists_have_weights_too() -> None:
    loss = FCRNLoss(data_format="channels_first")
    pred, target = np.random.rand(2, 7, 3, 3), np.random.rand(2, 7, 3, 3)
    of_lists = loss(target.tolist(), pred.tolist(), sample_weight=[1.0, 3.0])
    torch.testing.assert_close(of_lists, loss(target, pred, sample_weight=np.array([1.0, 3.0])))
