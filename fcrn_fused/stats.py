"""The parts of the loss, for logging."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FCRNLossStats(NamedTuple):
    """The parts of the loss: sums of the weighted squared error, before any division.

    All are detached 0-dim tensors on the device of `pred`; `.item()` on one waits for the device.
    `coord + positive_conf + negative_conf` is the loss with `reduction="sum"`.
    """

    coord: Tensor  # pose maps of positive cells, in the loss's dtype
    positive_conf: Tensor  # confidence of positive cells, in the loss's dtype
    negative_conf: Tensor  # confidence of negative cells, in the loss's dtype
    num_positive: Tensor  # number of positive cells, int64
