"""Multiple choice with a causal language model: the answer that the model finds most likely (commonsense sets, label words)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.base import Row, Task, register
from tasks.likelihood import joined, log_likelihoods, padded, prompt_ids
from tasks.metrics import plain_words, scores, token_f1
from tasks.templates import at, named

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    Batch = dict[str, Tensor]


@register
@dataclass
class Choice(Task):
    """Trained on the right answer behind its prompt, scored by the likelihoods of all answers.

    `answers` are templates over the columns, one per answer, or one template `{it}` with `each`, a column that holds the
    answers (`endings`, `choices.text`). `label` holds the index of the right answer, or one of `values` (a list, or the
    column that holds them, `choices.label`) in the order of the answers; or a list of texts, each of which is right (ReCoRD).
    `gap` is what an answer fills in a template of `answers` that has no `{it}`.
    """

    prompt: str = "Question: {question}\nAnswer:"
    answers: list[str] = field(default_factory=lambda: [" {it}"])  # with the space that parts them from the prompt
    each: str | None = None
    gap: str | None = None
    label: str = "label"
    values: Any = None
    metric: str = "accuracy"
    max_length: int = 512  # tokens of prompt and answer; the prompt loses its beginning

    kind: ClassVar[str] = "choice"
    collated: ClassVar[bool] = False
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "accuracy_norm", "matthews", "answer_logprob", "token_f1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.each is None and len(self.answers) < 2:
            raise ValueError(f"task.answers={self.answers}: give two or more templates, or the column task.each")

    def columns(self) -> list[str]:
        texts = [column for column in named(self.prompt + "".join(self.answers)) if column != "it"]
        lists = [path.partition(".")[0] for path in (self.each, self.values) if isinstance(path, str)]
        return list(dict.fromkeys([*texts, *lists, self.label]))

    def options_of(self, row: Row) -> list[str]:
        """The texts of the answers of one row."""
        if self.each is None:
            return [template.format(**row) for template in self.answers]
        return [self._filled(row, text) for text in at(row, self.each)]

    def _filled(self, row: Row, text: str) -> str:
        answer = self.answers[0].format(**row, it=text)
        return answer.replace(self.gap, text) if self.gap else answer

    def gold(self, row: Row) -> int:
        """The index of the right answer. Raises ValueError for a label that is none of the answers'."""
        if isinstance(row[self.label], list):
            right = self._right(row)
            if not right:
                raise ValueError(f"row {row['row_id']}: none of {self.label}={row[self.label]!r} is among the answers")
            return right[0]
        count = len(self.options_of(row))
        values = at(row, self.values) if isinstance(self.values, str) else self.values or range(count)
        known = [str(v) for v in values]
        if str(row[self.label]) not in known[:count]:
            raise ValueError(f"row {row['row_id']}: {self.label}={row[self.label]!r} is none of {', '.join(known)}")
        return known.index(str(row[self.label]))

    def _right(self, row: Row) -> list[int]:
        assert self.each is not None
        golds = {plain_words(text) for text in row[self.label]}
        return [i for i, text in enumerate(at(row, self.each)) if plain_words(text) in golds]

    def example(self, rng: Any) -> Row:
        from tasks import standin

        if self.gap is not None:
            return dict(zip(self.columns(), standin.cloze(rng, self.gap), strict=True))
        columns = named(self.prompt)
        if self.standin in standin.TEXTS:  # the answers are label words
            texts, gold = standin.TEXTS[self.standin](rng, len(self.answers))
            return dict(zip(columns, texts, strict=True)) | {self.label: self._value(gold)}
        question, answers, gold = standin.quiz(rng, 4 if self.each else len(self.answers))
        row: Row = dict.fromkeys(columns, "") | {columns[-1]: question}
        if self.each is None:
            row |= dict(zip(named("".join(self.answers)), answers, strict=True))
            return row | {self.label: self._value(gold)}
        names = ["A", "B", "C", "D"]
        for path, content in ((self.each, answers), (self.values if isinstance(self.values, str) else None, names)):
            if path is not None:
                column, _, key = path.partition(".")
                row[column] = row.get(column, {}) | {key: content} if key else content
        return row | {self.label: names[gold] if isinstance(self.values, str) else self._value(gold)}

    def _value(self, gold: int) -> Any:
        return self.values[gold] if self.values else gold

    def encode(self, row: Row, processor: Any) -> Row:
        """Ids of the prompt and the right answer; labels are -100 on the prompt."""
        return self._encoded(row, self.options_of(row)[self.gold(row)], processor)

    def _encoded(self, row: Row, answer: str, processor: Any) -> Row:
        length = min(self.max_length, processor.model_max_length)
        ids = processor(answer, add_special_tokens=False)["input_ids"]
        return joined(prompt_ids(self.prompt.format(**row), processor), ids, length)

    def collate(self, rows: list[Row], processor: Any) -> Batch:
        """(batch, longest row) int64 tensors, padded on the right; labels -100 on padding."""
        return padded(rows, processor.pad_token_id)

    def predict(self, model: nn.Module, batches: Iterable[tuple[Batch, list[Row]]], processor: Any) -> pd.DataFrame:
        """`prediction`: the likeliest answer; `prediction_norm`: that per character, as longer answers are less likely.

        `score` is the log-likelihood (nats) of the right answer among the row's answers.
        """
        import pandas as pd
        import torch

        model.eval()
        lines = []
        with torch.inference_mode():
            for _, rows in batches:
                texts = [self.options_of(row) for row in rows]
                encoded = [self._encoded(row, t, processor) for row, ts in zip(rows, texts, strict=True) for t in ts]
                found: list[float] = []
                for start in range(0, len(encoded), len(rows)):  # no more at once than the batch has rows
                    part = encoded[start : start + len(rows)]
                    found += log_likelihoods(model, part, processor.pad_token_id)
                for row, answers in zip(rows, texts, strict=True):
                    lines.append(self._line(row, answers, found[: len(answers)]))
                    del found[: len(answers)]
        return pd.DataFrame(lines)

    def _line(self, row: Row, answers: list[str], likely: list[float]) -> Row:
        import math

        each = [value / max(1, len(text.strip())) for value, text in zip(likely, answers, strict=True)]
        gold, best = self.gold(row), max(likely)
        among = likely[gold] - best - math.log(sum(math.exp(value - best) for value in likely))
        line = {"row_id": row["row_id"], "label": gold, "prediction": likely.index(best), "score": among}
        line |= {"prediction_norm": each.index(max(each))}
        return line | self._several(row, likely.index(best)) if isinstance(row[self.label], list) else line

    def _several(self, row: Row, best: int) -> Row:
        """Where several texts are right: one of them is `label` whichever was chosen, and F1 is the best over them."""
        assert self.each is not None
        right, chosen = self._right(row), at(row, self.each)[best]
        label = best if best in right else right[0]
        return {"label": label, "token_f1": max(token_f1(chosen, gold) for gold in row[self.label])}

    def score(self, predictions: pd.DataFrame) -> dict[str, float]:
        """Accuracy (also with likelihoods per character), Matthews correlation, mean log-likelihood of the right answer.

        Where several texts are right, accuracy is the exact match with any of them and `token_f1` the best F1 over them.
        """
        label = list(predictions["label"])
        found = scores(["accuracy", "matthews"], list(predictions["prediction"]), label)
        norm = scores(["accuracy"], list(predictions["prediction_norm"]), label)["accuracy"]
        found |= {"accuracy_norm": norm, "answer_logprob": float(predictions["score"].mean())}
        return found | ({"token_f1": float(predictions["token_f1"].mean())} if "token_f1" in predictions else {})
