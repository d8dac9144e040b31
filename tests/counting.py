"""How often the compiled operator runs."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def passes(run: Callable[[], object]) -> int:
    """The passes over the maps while `run` runs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return sum(
        event.count for event in profiler.key_averages() if event.key == "fcrn_fused::loss_pass"
    )
