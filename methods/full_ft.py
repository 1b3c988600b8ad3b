"""Full fine-tuning: every weight is trained, the reference that all other methods are compared with.

Devlin et al., https://arxiv.org/abs/1810.04805 (BERT, section 4).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from methods.base import Batch, Method, Unsupported, register


@register
@dataclass
class FullFT(Method):
    """Train the parameters whose names match `params`: all of them by default."""

    lr: ClassVar[float] = 2e-5  # BERT, appendix A.3: 5e-5, 3e-5 or 2e-5; RoBERTa, table 10: 1e-5 to 3e-5
    family: ClassVar[str] = "reference"
    acts: ClassVar[str] = "every weight"
    formula: ClassVar[str] = "all"
    mergeable: ClassVar[bool] = True  # in place
    shardable: ClassVar[bool] = True

    params: str = "."  # regular expression over the full names of parameters

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        chosen = [p for n, p in model.named_parameters() if re.search(self.params, n)]
        if not chosen:
            raise Unsupported(f"no parameter of {type(model).__name__} matches params={self.params!r}")
        for p in chosen:
            p.requires_grad_()
        return model
