"""Several threads at once, spawned processes, DDP with two of them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracle
import pytest
import torch
from batches import make_batch
from implementations import Implementation
from tolerances import assert_gradient, assert_loss


def test_threads_at_once(impl: Implementation) -> None:
    """Eight threads, each with its own inputs and sizes; every result is right to the bit."""
    wanted = {}
    for seed in range(8):
        pred, target = make_batch((1 + seed, 7, 11, 13 + seed), device=impl.device, seed=seed)
        loss = impl.loss(pred, target, negative_weight=0.1)
        loss.backward()
        wanted[seed] = loss.detach(), pred.grad
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        pred, target = make_batch((1 + seed, 7, 11, 13 + seed), device=impl.device, seed=seed)
        start.wait()
        for repeat in range(20):
            pred.grad = None
            loss = impl.loss(pred, target, negative_weight=0.1)
            (loss if repeat % 2 else 1.0 * loss).backward()
            assert torch.equal(loss.detach(), wanted[seed][0])
            assert torch.equal(pred.grad, wanted[seed][1])

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, seed) for seed in range(8)]:
            future.result()


def test_threads_share_a_module_and_its_inputs(impl: Implementation) -> None:
    module = impl.module(negative_weight=0.1, reduction="positive")
    pred, target = make_batch((4, 7, 16, 16), device=impl.device)
    truth = oracle.fcrn_loss(
        pred, target, negative_weight=module.negative_weight, reduction="positive"
    )

    def work(_: int) -> None:
        for _ in range(10):
            loss = module(pred, target)
            (grad,) = torch.autograd.grad(loss, pred)
            assert_loss(loss, truth.loss, torch.float32)
            assert_gradient(grad, truth.grad, torch.float32)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_one_graph_backward_from_many_threads(impl: Implementation) -> None:
    """The kept gradient is given away once, to one of the threads; the others compute it."""
    for _ in range(20):
        pred, target = make_batch(device=impl.device)
        loss = impl.loss(pred, target)
        start = threading.Barrier(4)

        def work(_: int, loss=loss, pred=pred, start=start) -> torch.Tensor:
            start.wait()
            (grad,) = torch.autograd.grad(loss, pred, retain_graph=True)
            return grad

        with ThreadPoolExecutor(4) as pool:
            grads = list(pool.map(work, range(4)))
        truth = oracle.fcrn_loss(pred, target)
        for grad in grads:
            assert_gradient(grad, truth.grad, torch.float32)
        pointers = {grad.data_ptr() for grad in grads}
        assert len(pointers) == 4, "two owners of one gradient"


def test_errors_in_one_thread_do_not_disturb_another(impl: Implementation) -> None:
    pred, target = make_batch(device=impl.device)
    truth = oracle.fcrn_loss(pred, target)

    def fail(_: int) -> None:
        for _ in range(50):
            with pytest.raises(ValueError, match="average"):
                impl.loss(pred, target, reduction="average")

    def work(_: int) -> None:
        for _ in range(50):
            assert_loss(impl.loss(pred, target), truth.loss, torch.float32)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(job, 0) for job in (fail, work, fail, work)]
        for future in futures:
            future.result()


def run_script(script: Path, *arguments: str) -> str:
    """Run a script in a process of its own, as `torch.multiprocessing` needs a main module."""
    run = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_spawned_processes(device: str, tmp_path: Path) -> None:
    """A module with its weight, and CUDA tensors or shared ones, cross into another process."""
    script = tmp_path / "processes.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import fcrn_fused, torch
            import torch.multiprocessing as mp

            def loss_and_gradient(module, pred, target, results):
                pred = pred.detach().requires_grad_()
                loss = module(pred, target)
                loss.backward()
                results.put((loss.item(), pred.grad.tolist()))

            if __name__ == "__main__":
                context = mp.get_context("spawn")
                module = fcrn_fused.FCRNLoss(negative_weight=0.25, reduction="sum").to({device!r})
                generator = torch.Generator().manual_seed(0)
                pred = torch.randn((2, 3, 40, 41), generator=generator).to({device!r})
                target = torch.rand((2, 3, 40, 41), generator=generator).round().to({device!r})
                here = context.Queue()
                loss_and_gradient(module, pred, target, here)
                want = here.get()
                there = context.Queue()
                workers = [
                    context.Process(target=loss_and_gradient, args=(module, pred, target, there))
                    for _ in range(2)
                ]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    assert there.get(timeout=100) == want
                for worker in workers:
                    worker.join()
                    assert worker.exitcode == 0
                print("the same in every process")
            """
        )
    )
    assert "the same in every process" in run_script(script)


DDP_SCRIPT = """
import sys
import fcrn_fused, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def step(network, loss, picture, target):
    value, stats = loss(network(picture), target)
    # the normalisation over all processes that the documentation recommends
    num_positive = stats.num_positive.clone().float()
    dist.all_reduce(num_positive)
    (value * dist.get_world_size() / num_positive.clamp(min=1)).backward()

def main(rank, world, store, device):
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    dist.init_process_group(
        "nccl" if "cuda" in device else "gloo",
        store=dist.FileStore(store, world), rank=rank, world_size=world,
    )
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 7, 3, padding=1).to(device)
    picture = torch.randn(4, 3, 6, 6).to(device)
    target = torch.rand(4, 7, 6, 6).to(device)
    target[:, -1] = (target[:, -1] > 0.7).float()
    loss = fcrn_fused.FCRNLoss(reduction="sum", negative_weight=0.1, return_stats=True).to(device)

    whole = fcrn_fused.reference.fcrn_loss(
        network(picture), target, reduction="positive", negative_weight=loss.negative_weight
    )
    whole.backward()
    want = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()

    parallel = DistributedDataParallel(network)
    share = slice(rank * 2, rank * 2 + 2)
    step(parallel, loss, picture[share], target[share])
    for parameter, expected in zip(network.parameters(), want):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)

    # the loss inside of the wrapped model: its buffer is broadcast with the others
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = torch.nn.Conv2d(3, 7, 1)
            self.loss = fcrn_fused.FCRNLoss(negative_weight=0.5 if rank == 0 else 0.9)
        def forward(self, picture, target):
            return self.loss(self.network(picture), target)

    model = DistributedDataParallel(Model().to(device))
    model(picture[share], target[share]).backward()
    assert model.module.loss.negative_weight.item() == 0.5
    model.zero_grad()

    # two forwards and one backward, with a weight that changes on rank 0 and is broadcast between
    first = model(picture[share], target[share])
    if rank == 0:
        model.module.loss.negative_weight.fill_(1.0)
    second = model(2 * picture[share], target[share])
    assert model.module.loss.negative_weight.item() == 1.0
    (3 * (first + second)).backward()
    alone = model.module.network
    total = sum(
        fcrn_fused.reference.fcrn_loss(alone(scale * picture), target, negative_weight=weight)
        for scale, weight in ((1, 0.5), (2, 1.0))
    )
    for parameter, want in zip(
        alone.parameters(), torch.autograd.grad(3 * total, list(alone.parameters()))
    ):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} agrees")

if __name__ == "__main__":
    main(int(sys.argv[1]), 2, *sys.argv[2:])
"""


@pytest.mark.slow
def test_ddp_of_two_processes_is_the_loss_of_the_whole_batch(device: str, tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device(s), two are needed")
    script = tmp_path / "ddp.py"
    script.write_text(DDP_SCRIPT)
    # started here, not by mp.spawn, which would import PyTorch a third time
    command = (sys.executable, str(script))
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), device],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
            assert f"rank {rank} agrees" in output
    finally:  # one waits for the other, which may have failed
        for process in processes:
            process.kill()
            process.wait()
