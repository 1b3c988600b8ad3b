"""The metrics of this project as one module of `evaluate`, which needs no network.

    evaluate.load("tasks/evaluate_metric.py", "matthews").compute(predictions=[0, 1], references=[0, 1])

Its configurations are the functions of `tasks/metrics.py`. More than two classes: `labels=3`; answer options that are rows:
`questions=[...]`, the question of each row.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from tasks.metrics import FUNCTIONS

_TYPES = {"pearson": "float64", "spearman": "float64", "exact_match": "string"}


class Paretune(evaluate.Metric):
    """The metric that `config_name` names. Raises ValueError for a name that there is not."""

    def _info(self) -> Any:
        if self.config_name not in FUNCTIONS:
            raise ValueError(f"there is no metric {self.config_name!r}; the metrics are {', '.join(FUNCTIONS)}")
        kind = _TYPES.get(self.config_name, "int64")
        return evaluate.MetricInfo(
            description=FUNCTIONS[self.config_name].__doc__ or "",
            citation="",
            features=datasets.Features({side: datasets.Value(kind) for side in ("predictions", "references")}),
            inputs_description="",
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        return {self.config_name: FUNCTIONS[self.config_name](predictions, references, **options)}
