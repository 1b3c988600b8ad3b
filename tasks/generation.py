"""Answers by greedy generation, scored by the number extracted from the text and by the likelihood of the reference."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.base import Row, Task, choose, register
from tasks.decoding import Limits, generate, greedy
from tasks.latex import boxed, number, plain
from tasks.likelihood import joined, log_likelihoods, padded, prompt_ids
from tasks.metrics import scores
from tasks.templates import named

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from torch import Tensor, nn

    Batch = dict[str, Tensor]

VALUES = ("number", "latex")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


@register
@dataclass
class Generation(Task):
    """The loss is on the answer alone unless `mask_prompt=false`. Templates name columns of the data set."""

    prompt: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"  # follows the prompt directly, then the end-of-sequence token
    mask_prompt: bool = True
    strict: str = r"####\s*(-?\$?-?[0-9.,]+)"  # its first group is the answer, in references and in generated text
    value: str = "number"  # what an answer is; latex: what \\boxed{} holds, see `tasks/latex.py`
    stop: list[str] = field(default_factory=lambda: ["Question:"])  # generated text ends before the first of these
    max_length: int = 512  # tokens of prompt and answer in training; the prompt loses its beginning
    max_new_tokens: int = 256
    metric: str = "exact_match"

    kind: ClassVar[str] = "generation"
    phase: ClassVar[str] = "generation"
    collated: ClassVar[bool] = False
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "exact_match_flexible", "answer_logprob", "answered")

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("task.value", self.value, VALUES)

    def columns(self) -> list[str]:
        return list(dict.fromkeys(named(self.prompt + self.answer)))

    def example(self, rng: Any) -> Row:
        from tasks import standin

        *asked, answered = self.columns()
        question, answer = standin.PROBLEMS[self.standin](rng)
        parts = question.rsplit(". ", 1) if len(asked) > 1 else [question]
        return dict(zip(asked, parts, strict=True)) | {answered: answer}

    def check(self, rows: Dataset, split: str) -> None:
        """Raise ValueError where a row of val or test has no answer to compare with."""
        if split == "train":
            return
        for row in rows:
            if not self.extract(self.answer.format(**row))[0]:
                raise ValueError(
                    f"{self.path}/{self.name}: {split} row {row['row_id']}: no answer ({self.value}, {self.strict!r}) in the "
                    f"reference {self.answer.format(**row)!r}"
                )

    def encode(self, row: Row, processor: Any) -> Row:
        """Ids of prompt, answer and end; labels are -100 on the prompt. An over-long answer loses its end."""
        answer = processor(self.answer.format(**row), add_special_tokens=False)["input_ids"]
        length = min(self.max_length, processor.model_max_length)
        answer = [*answer[: length - 2], processor.eos_token_id]
        return joined(self._prompt(row, processor), answer, length, mask_prompt=self.mask_prompt)

    def collate(self, rows: list[Row], processor: Any) -> Batch:
        """(batch, longest row) int64 tensors, padded on the right; labels -100 on padding."""
        return padded(rows, processor.pad_token_id)

    def predict(self, model: nn.Module, batches: Iterable[tuple[Batch, list[Row]]], processor: Any) -> pd.DataFrame:
        """Strictly extracted numbers as `prediction`; also prediction_flexible, text and nll (per answer token).

        `score` is -nll. Rows must hold the columns of the data set. Prompts are padded on the left, decoding is greedy.
        """
        import pandas as pd
        import torch

        model.eval()
        parts: list[list[Row]] = []

        def prompts() -> Iterator[list[list[int]]]:
            for _, rows in batches:
                parts.append(rows)
                yield [self._prompt(row, processor) for row in rows]

        with torch.inference_mode():
            texts = self._generate(model, prompts(), processor)
            nll = [value for rows in parts for value in self._nll(model, rows, processor)]
        rows = [row for part in parts for row in part]
        return pd.DataFrame([self._line(*line) for line in zip(rows, texts, nll, strict=True)])

    def score(self, predictions: pd.DataFrame) -> dict[str, float]:
        """Strict and flexible exact match, share of strictly answered rows, and the mean log-likelihood per token."""
        label = list(predictions["label"])
        nll = float(predictions["nll"].mean())
        return {
            "exact_match": scores(["exact_match"], list(predictions["prediction"]), label)["exact_match"],
            "exact_match_flexible": scores(["exact_match"], list(predictions["prediction_flexible"]), label)[
                "exact_match"
            ],
            "answered": float((predictions["prediction"] != "").mean()),
            "answer_nll": nll,
            "answer_logprob": -nll,
        }

    def extract(self, text: str) -> tuple[str, str]:
        """The strict and the flexible answer of a generated text, in plain form; empty where there is none.

        Strict: the first match of `strict`, or under `value=latex` the last box. Flexible: the last number anywhere, or
        under `value=latex` the last box, else the first match of `strict`, else the last number.
        """
        match, numbers = re.search(self.strict, text), _NUMBER.findall(text)
        found, last = match.group(1) if match else "", numbers[-1] if numbers else ""
        if self.value == "number":
            return number(found), number(last)
        box = plain(boxed(text))
        return box, box or plain(found) or number(last)

    def _prompt(self, row: Row, processor: Any) -> list[int]:
        return prompt_ids(self.prompt.format(**row), processor)

    def _line(self, row: Row, text: str, nll: float) -> Row:
        strict, flexible = self.extract(text)
        gold = self.extract(self.answer.format(**row))[0]
        line = {"row_id": row["row_id"], "label": gold, "prediction": strict, "score": -nll}
        return line | {"prediction_flexible": flexible, "text": text, "nll": nll}

    def _generate(self, model: nn.Module, prompts: Iterable[list[list[int]]], processor: Any) -> list[str]:
        """The text after each prompt, decoded greedily until it ends or a string of `stop` shows."""
        window = 2 + max((len(s.encode()) for s in self.stop), default=0)  # a token is a byte or more

        def stopped(new: list[int]) -> bool:
            return any(s in processor.decode(new[-window:]) for s in self.stop)

        limits = Limits(_ends(model, processor), self.max_new_tokens, processor.pad_token_id, stopped)
        decode = greedy if _plain(model) else generate
        return [
            self._stopped(processor.decode(new, skip_special_tokens=True)) for new in decode(model, prompts, limits)
        ]

    def _stopped(self, text: str) -> str:
        return text[: min([text.find(s) for s in self.stop if s in text], default=len(text))]

    def _nll(self, model: nn.Module, rows: list[Row], processor: Any) -> list[float]:
        """Mean negative log-likelihood (nats) per token of each reference answer, its end included."""
        encoded = [self.encode(row, processor) for row in rows]
        found = log_likelihoods(model, encoded, processor.pad_token_id)
        return [-total / row["answer_tokens"] for total, row in zip(found, encoded, strict=True)]


def _ends(model: nn.Module, processor: Any) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = own if isinstance(own, list) else [own]
    return sorted({e for e in [*ends, processor.eos_token_id] if e is not None})


def _plain(model: nn.Module) -> bool:
    """Whether the model reads tokens as they are; peft's prompt tuners put theirs in front inside `generate`."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)
