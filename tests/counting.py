"""How often the compiled operators run."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def passes(run: Callable[[], object]) -> int:
    """The passes over the maps while `run` runs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    operators = ("fcrn_fused::forward_into", "fcrn_fused::backward_into")
    return sum(event.count for event in profiler.key_averages() if event.key in operators)
