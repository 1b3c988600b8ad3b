"""AdamW for parameters that join in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class RestartedAdamW(torch.optim.AdamW):
    """AdamW whose late groups (`warm` steps of their own warm-up, `age` steps old) join the schedule by and by."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["age"] += bool(group["params"])
            group["lr"] *= min(1.0, group["age"] / group["warm"])
        loss = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss
