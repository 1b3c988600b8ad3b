"""Text classification and regression, of one text or a pair (GLUE, SuperGLUE, reviews), with an encoder or a decoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.base import Row, Task, register
from tasks.metrics import scores
from tasks.templates import at, named

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    Batch = dict[str, Tensor]

_CLASSES = ("accuracy", "f1", "matthews")
_OPTIONS = ("f1_question", "exact_question")
_VALUES = ("pearson", "spearman", "pearson_spearman")


@register
@dataclass
class Classification(Task):
    """Labels are classes 0..labels-1, or with `labels=1` one real value (mean squared error)."""

    text: list[str] = field(default_factory=lambda: ["sentence"])  # one or two columns, or templates over columns
    question: list[str] = field(
        default_factory=list
    )  # column.key that name the question whose options are rows (MultiRC)
    label: str = "label"
    labels: int = 2  # 1: regression
    metric: str = "accuracy"
    max_length: int = 256  # tokens of the whole input; also bounded by the model

    kind: ClassVar[str] = "classification"
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    head: ClassVar[tuple[str, ...]] = ("classifier", "score", "pre_classifier", "pooler", "classification_head")
    metrics: ClassVar[tuple[str, ...]] = _CLASSES + _OPTIONS + _VALUES

    def __post_init__(self) -> None:
        super().__post_init__()
        options = _VALUES if self.labels == 1 else _CLASSES + (_OPTIONS if self.question else ())
        if self.metric not in options:
            kind = ", ".join(options)
            raise ValueError(f"task.metric={self.metric!r} does not fit task.labels={self.labels}: it takes {kind}")

    def options(self, config: Any = None) -> dict[str, Any]:
        """Number of outputs, and the loss: squared error for one, cross-entropy for more."""
        problem = "regression" if self.labels == 1 else "single_label_classification"
        return {"num_labels": self.labels, "problem_type": problem}

    def columns(self) -> list[str]:
        return list(dict.fromkeys([*self._texts(), *(path.partition(".")[0] for path in self.question), self.label]))

    def _texts(self) -> list[str]:
        return [column for text in self.text for column in named(text) or [text]]

    def target(self) -> str | None:
        return self.label if self.labels > 1 else None

    def example(self, rng: Any) -> Row:
        from tasks import standin

        texts, label = standin.TEXTS[self.standin](rng, self.labels)
        return dict(zip(self.columns(), [*texts, label], strict=True))

    def encode(self, row: Row, processor: Any) -> Row:
        """Token ids; a pair gets the tokenizer's own separator, or a line break where it has none (GPT-2)."""
        texts = [text.format(**row) if named(text) else row[text] for text in self.text]
        if len(texts) > 1 and not _separates(processor):
            texts = ["\n".join(texts)]
        length = min(self.max_length, processor.model_max_length)
        inputs = processor(*texts, truncation=True, max_length=length)
        value = float(row[self.label]) if self.labels == 1 else int(row[self.label])
        return dict(inputs) | {"labels": value}

    def collate(self, rows: list[Row], processor: Any) -> Batch:
        """(batch, longest row) ids and mask, padded on the right; labels int64, or float32 for regression."""
        import torch

        names = [n for n in processor.model_input_names if n in rows[0]]
        inputs = processor.pad([{n: r[n] for n in names} for r in rows], padding_side="right", return_tensors="pt")
        kind = torch.float32 if self.labels == 1 else torch.int64
        return dict(inputs) | {"labels": torch.tensor([r["labels"] for r in rows], dtype=kind)}

    def predict(self, model: nn.Module, batches: Iterable[tuple[Batch, list[Row]]], processor: Any) -> pd.DataFrame:
        """`prediction` is the class with `score` its lead in logits over the runner-up; in regression both are the value."""
        import pandas as pd
        import torch

        model.eval()
        device = next(model.parameters()).device
        parts = []
        with torch.inference_mode():
            for batch, rows in batches:
                inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
                logits = model(**inputs).logits.float().cpu()
                table = {"row_id": [r["row_id"] for r in rows], "label": batch["labels"].cpu().numpy()} | _decide(
                    logits
                )
                if self.question:
                    table["question"] = ["/".join(str(at(r, path)) for path in self.question) for r in rows]
                parts.append(pd.DataFrame(table))
        return pd.concat(parts, ignore_index=True)

    def score(self, predictions: pd.DataFrame) -> dict[str, float]:
        """Accuracy, F1 (binary: of class 1, else macro) and Matthews correlation; or Pearson, Spearman and their mean.

        Where options of one question are rows: F1 is over all of them (F1a), `f1_question` the mean of each question's F1
        (F1m), `exact_question` the share of questions with all options right (EM).
        """
        names = _VALUES[:2] if self.labels == 1 else _CLASSES
        label, prediction = list(predictions["label"]), list(predictions["prediction"])
        found = scores(names, prediction, label, self.labels)
        if self.question:
            found |= scores(_OPTIONS, prediction, label, questions=list(predictions["question"]))
        return found | {"pearson_spearman": (found["pearson"] + found["spearman"]) / 2} if self.labels == 1 else found


def _separates(processor: Any) -> bool:
    return processor.num_special_tokens_to_add(pair=True) > processor.num_special_tokens_to_add(pair=False)


def _decide(logits: Tensor) -> dict[str, Any]:
    """Predictions and scores of (rows, classes) logits. Raises FloatingPointError where they are not finite."""
    import torch

    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's outputs are not finite: training has diverged")
    if logits.shape[-1] == 1:
        return {"prediction": logits[:, 0].numpy(), "score": logits[:, 0].numpy()}
    best = logits.topk(2, dim=-1)
    return {"prediction": best.indices[:, 0].numpy(), "score": (best.values[:, 0] - best.values[:, 1]).numpy()}
