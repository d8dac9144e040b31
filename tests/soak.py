"""A robustness run: random calls, errors and threads, for as long as one likes.

    python -m tests.soak --seconds 120 --seed 0

Every call is made from its own seed. A failure prints it, with the call in full, and

    python -m tests.soak --replay SEED

makes that call alone. At the end, memory after all calls is held against memory after the first
thousand (10^5 small calls are made for that alone).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import random
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the tests' modules are no package

import torch
from batches import DTYPES, REDUCTIONS, make_batch
from calls import check_call, tensors_of
from implementations import IMPLEMENTATIONS, Implementation

import fcrn_fused

BAD_SETTINGS: list[dict[str, Any]] = [
    {"reduction": "average"},
    {"negative_weight": -1.0},
    {"negative_weight": float("nan")},
    {"negative_weight": torch.ones(2)},
    {"positive_weight": float("inf")},
    {"positive_weight": "1"},
    {"coord_weight": [1.0] * 99},
    {"coord_weight": torch.ones((), requires_grad=True)},
    {"ignore_value": float("nan")},
]


def random_layout(rng: random.Random, dims: int) -> dict[str, Any]:
    order = list(range(dims))
    kind = rng.randrange(3)
    if kind == 1:
        order = [0, *range(2, dims), 1]
    elif kind == 2:
        rng.shuffle(order)
    return {
        "order": tuple(order),
        "steps": [rng.choice([1, 1, 1, 1, 2, 3]) for _ in range(dims)],
        "offset": rng.choice([0, 0, rng.randrange(17)]),
        "expanded": {rng.randrange(dims)} if rng.random() < 0.2 else set(),
    }


def random_weight(rng: random.Random) -> float:
    return rng.choice([0.0, 0.01, 1.0, rng.uniform(0.001, 10)])


def random_call(seed: int) -> dict[str, Any]:
    """The call that belongs to a seed: small enough for the loops, in every other way anything."""
    rng = random.Random(seed)
    maps = rng.choice([1, 2, 3, 7, 7, 7, 8, 11])
    space = [
        rng.choice([0, 1, 1, 2, 3, 5, 8, 13, 16, 17]) for _ in range(rng.choice([0, 1, 2, 2, 3]))
    ]
    if rng.random() < 0.8:
        space = [max(1, size) for size in space]
    while maps * torch.Size(space).numel() > 3000:
        space[space.index(max(space))] //= 2
    shape = (rng.choice([0, 1, 1, 2, 3]), maps, *space)
    return {
        "shape": shape,
        "pred_dtype": rng.choice(DTYPES),
        "target_dtype": rng.choice(DTYPES),
        "pred_layout": random_layout(rng, len(shape)),
        "target_layout": random_layout(rng, len(shape)),
        "seed": rng.randrange(2**32),
        "positives": rng.choice([0.0, 0.02, 0.2, 1.0]),
        "poisoned": rng.random() < 0.5,
        "magnitude": rng.choice([1e-2, 1.0, 30.0]),
        "grad_output": rng.choice([1.0, 0.5, -3.0, 100.0, rng.uniform(0.01, 10)]),
        "settings": {
            "reduction": rng.choice(REDUCTIONS),
            "negative_weight": random_weight(rng),
            "positive_weight": random_weight(rng),
            "coord_weight": rng.choice(
                [random_weight(rng), [random_weight(rng) for _ in range(maps - 1)]]
            ),
            "ignore_value": rng.choice([None, -1.0, 0.0, 0.1, 255]),
        },
        "weights_in_tensors": rng.random() < 0.3,
    }


def check_error(impl: Implementation, seed: int) -> None:
    """A call that must be refused, and that must leave its inputs as they are."""
    rng = random.Random(seed)
    pred, target = tensors_of(random_call(seed), impl.device)
    before = pred.clone()
    bad = rng.choice(BAD_SETTINGS)
    try:
        impl.loss(pred, target, **bad)
    except (TypeError, ValueError):
        pass
    else:
        raise AssertionError(f"{bad} was not refused")
    assert torch.equal(pred.nan_to_num(7), before.nan_to_num(7))


def check_large(impl: Implementation, seed: int) -> None:
    """A call large enough for several threads and blocks, against the reference in float64."""
    rng = random.Random(seed)
    shape = (rng.randrange(1, 9), 7, rng.randrange(60, 200), rng.randrange(60, 200))
    settings = {"reduction": rng.choice(REDUCTIONS), "negative_weight": random_weight(rng)}
    pred, target = make_batch(
        shape, device=impl.device, positives=rng.choice([0.0, 0.02, 1.1]), seed=seed
    )
    loss = impl.loss(pred, target, **settings)
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    wide = [tensor.detach().double().requires_grad_() for tensor in (pred, target)]
    want = fcrn_fused.reference.fcrn_loss(*wide, **settings)
    (want_grad,) = torch.autograd.grad(want.sum(), wide[0])
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-6, atol=1e-30)


def check_one(impl: Implementation, seed: int) -> None:
    """What belongs to a seed: mostly a call, now and then an error or a large input."""
    kind = seed % 20
    on_stream = impl.device == "cuda" and random.Random(seed).random() < 0.5
    stream = torch.cuda.Stream() if on_stream else None
    with torch.cuda.stream(stream):
        if kind == 0:
            check_large(impl, seed)
        elif kind == 1:
            check_error(impl, seed)
        else:
            check_call(impl, random_call(seed))


class Soak:
    """Threads that make the calls of ever new seeds until the time is over or one has failed."""

    def __init__(self, implementations: list[Implementation], seconds: float, seed: int) -> None:
        self.implementations = implementations
        self.end = time.monotonic() + seconds
        self.seeds = itertools.count(seed)
        self.calls = 0
        self.failure: tuple[Implementation, int, str] | None = None
        self.lock = threading.Lock()

    def run(self, threads: int) -> None:
        workers = [threading.Thread(target=self._work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _work(self) -> None:
        while time.monotonic() < self.end and self.failure is None:
            with self.lock:
                seed = next(self.seeds)
            for impl in self.implementations:
                try:
                    check_one(impl, seed)
                except Exception:
                    with self.lock:
                        self.failure = self.failure or (impl, seed, traceback.format_exc())
                    return
                with self.lock:
                    self.calls += 1


def report(impl: Implementation, seed: int, trace: str) -> None:
    print(trace)
    print(f"{impl} failed at seed {seed}; replay it with: python -m tests.soak --replay {seed}")
    print(f"the call: {random_call(seed)}")


def memory(device: str) -> int:
    """Bytes in use by the process (resident), or by PyTorch on the GPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_growth(impl: Implementation, calls: int, after: int = 1000) -> int:
    """Bytes by which `calls` small steps have grown the process since the first `after`."""
    module = impl.module(negative_weight=0.1, ignore_value=-1.0, return_stats=True)
    pred, target = make_batch((2, 7, 4, 4), device=impl.device)
    start = 0
    for i in range(calls):
        loss, _ = module(pred, target)
        pred.grad = None
        (loss if i % 2 else 3 * loss).backward()
        if i % 100 == 0:
            with contextlib.suppress(ValueError):
                impl.loss(pred, target, reduction="average")
        if i == after:
            start = memory(impl.device)
    return memory(impl.device) - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=120, help="how long (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="callers at once (default: 2)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="make one seed's call, alone")
    parser.add_argument(
        "--memory-calls", type=int, default=100_000, help="calls for the memory test (0: none)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)

    implementations = []
    for impl in IMPLEMENTATIONS:
        reason = impl.why_not()
        print(f"{impl}: {'left out, ' + reason if reason else 'under test'}")
        if reason is None:
            implementations.append(impl)

    if options.replay is not None:
        for impl in implementations:
            try:
                check_one(impl, options.replay)
            except Exception:
                report(impl, options.replay, traceback.format_exc())
                return 1
        print(f"seed {options.replay}: right")
        return 0

    soak = Soak(implementations, options.seconds, options.seed)
    soak.run(options.threads)
    if soak.failure is not None:
        report(*soak.failure)
        return 1
    last = next(soak.seeds) - 1
    print(f"{soak.calls} calls, seeds {options.seed} to {last}: all right")

    for impl in implementations:
        if impl.is_fused and options.memory_calls:
            growth = memory_growth(impl, options.memory_calls)
            print(f"{impl}: {growth / 1024:.0f} KiB more after {options.memory_calls} calls")
            if growth > 2**20:
                print("that is a leak")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
