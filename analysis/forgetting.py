"""Forgetting: what a tuned model can no longer do of what it was pretrained for; before and after on the same yardstick.

Decoders: language-model loss on a text like those of pretraining. Encoders: pseudo-loss, one masked token at a time (Salazar
et al. 2020, https://arxiv.org/abs/1910.14659). Images: accuracy of a linear probe, fitted anew on the frozen features of
another set. The tuned backbone takes its place under the pretrained head, which the task's own head had replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from analysis.forgetting_text import texts
from methods.base import Unsupported
from tasks.data import MissingData

if TYPE_CHECKING:
    from bench.config import Config
    from bench.prepare import Prepared
    from bench.record import Record

ROWS, LENGTH = 24, 48  # texts, and tokens of each
Rows = list[tuple[Tensor, list[int]]]  # ids (tokens,), and the positions that are predicted


@dataclass
class Yardstick:
    """A number for a model: `loss` (nats per token, lower is better) or `accuracy`; `source` says on which rows."""

    measure: str
    value: Callable[[Any], float]
    source: dict[str, Any]

    def lost(self, before: float, after: float) -> float:
        """Forgetting: positive where the model has become worse."""
        return after - before if self.measure == "loss" else before - after


@dataclass
class Language:
    """What `bench.model.build` asks of a task: here the checkpoint's own head."""

    model_class: str
    kind: ClassVar[str] = "language"
    head: ClassVar[tuple[str, ...]] = ()

    def options(self, config: Any = None) -> dict[str, Any]:
        """None of its own."""
        return {}


def of_run(
    model: nn.Module, config: Config, text: str | None = None, known: dict[str, float] | None = None
) -> dict[str, Any]:
    """The record's `forgetting`: `before`, `after`, `forgetting`, `measure` and the source; or only a `reason` why not.

    model: the trained one. text: a name of `forgetting_text.TEXTS`. known: values of pretrained models, which are added to it.
    """
    from analysis.weights import built

    known = {} if known is None else known
    try:
        stick = yardstick(model, config, text)
        after = stick.value(model)
    except (Unsupported, MissingData) as error:
        return {"reason": str(error)}
    like = next(model.parameters())
    key = f"{config.model} {config.seed if config.model.path.startswith('random:') else ''} {like.dtype} {stick.source}"
    if key not in known:
        known[key] = stick.value(built(config).model.to(like))
    numbers = {"before": known[key], "after": after, "forgetting": stick.lost(known[key], after)}
    return {"measure": stick.measure} | numbers | stick.source


def of_records(folder: Path, root: str | None = None, device: str = "cpu", text: str | None = None) -> str:
    """Write the forgetting of each ok run below `folder` into its record; a line of text for each."""
    from analysis.spectra_runs import each

    known: dict[str, float] = {}

    def body(path: Path, record: Record, config: Config, ready: Prepared) -> str:
        record.forgetting = of_run(ready.model, config, text, known)
        record.save(path.parent)
        return sentence(record.forgetting)

    return each(folder, body, root, device)


def sentence(numbers: dict[str, Any]) -> str:
    """A record's `forgetting` for people."""
    if "reason" in numbers:
        return f"not measured: {numbers['reason']}"
    return "{measure} {before:.4f} before, {after:.4f} after: forgetting {forgetting:+.4f} ({text})".format(**numbers)


def yardstick(model: Any, config: Config, text: str | None = None) -> Yardstick:
    """What models of this configuration are measured by. Raises Unsupported with a sentence where there is nothing.

    model: the trained one or any other of its kind, for its architecture and device.
    """
    backbone(model)
    if config.task.kind == "image":
        return _probe(config)
    if model.config.is_encoder_decoder:
        raise Unsupported(f"forgetting of an encoder-decoder ({model.config.model_type}) is not defined here")
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return _language(model, config, text, masked=model.config.model_type in MASKED)


def backbone(model: Any) -> nn.Module:
    """What lies under the task's head. Raises Unsupported for a wrapper, whose own inputs its backbone does not see."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise Unsupported(f"{type(model).__name__} wraps the model: its backbone alone is not what was trained")
    return model.base_model


def _language(model: Any, config: Config, text: str | None, masked: bool) -> Yardstick:
    from analysis.weights import built

    found = built(config, Language("AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"))
    if found.head:
        some = ", ".join(found.head[:2])
        raise Unsupported(f"{config.model.path} brings no language-model head (it lacks {some}), so no loss on a text")
    whole, tokenizer = found.model.to(next(model.parameters())).eval(), found.processor
    if masked and tokenizer.mask_token_id is None:
        raise Unsupported(f"the tokenizer of {config.model.path} has no mask token")
    words, source = texts(config.data, ROWS, text, config.task.path)
    rows = _rows(words, tokenizer, masked)
    mask = tokenizer.mask_token_id if masked else None
    counts = {"rows": len(rows), "tokens": sum(len(places) for _, places in rows)}

    def value(tuned: Any) -> float:
        return loss(tuned if type(tuned) is type(whole) else _under(whole, backbone(tuned)), rows, mask)

    return Yardstick("loss", value, source | counts | {"kind": "masked" if masked else "causal"})


def _under(whole: Any, own: nn.Module) -> nn.Module:
    """The language model `whole` with `own` as its backbone; a tied head follows the embedding."""
    setattr(whole, whole.base_model_prefix, own)
    whole.tie_weights()
    return whole


def _rows(words: list[str], tokenizer: Any, masked: bool) -> Rows:
    rows = []
    for text in words:
        found = tokenizer(text, truncation=True, max_length=LENGTH, return_special_tokens_mask=True)
        special = found["special_tokens_mask"]
        places = [i for i, s in enumerate(special) if not s and (masked or i)]
        rows.append((torch.tensor(found["input_ids"]), places))
    return rows


@torch.inference_mode()
def loss(model: Any, rows: Rows, mask: int | None, batch: int = 32) -> float:
    """Mean negative log-likelihood, nats per predicted token; mask: the token that hides one at a time, None: causal."""
    training, device, total = model.training, next(model.parameters()).device, 0.0
    model.eval()
    for ids, places in rows:
        ids = ids.to(device)
        inputs = ids[None] if mask is None else ids.repeat(len(places), 1)
        at = torch.tensor(places, device=device)
        if mask is not None:
            inputs[range(len(places)), at] = mask
        logits = torch.cat([model(input_ids=part).logits[:, -len(ids) :].float() for part in inputs.split(batch)])
        seen = logits[0, at - 1] if mask is None else logits[range(len(places)), at]
        total += float(nn.functional.cross_entropy(seen, ids[at], reduction="sum"))
    model.train(training)
    return total / sum(len(places) for _, places in rows)


def _probe(config: Config) -> Yardstick:
    """A probe of CIFAR-10, or of the digits where the task is CIFAR-10."""
    from omegaconf import OmegaConf

    from analysis.weights import built
    from bench.config import CONF
    from bench.encoded import Encoded
    from tasks.image import Image

    name = "digits" if "cifar10" in config.task.path else "cifar10"
    values: Any = OmegaConf.to_container(OmegaConf.load(CONF / "task" / f"{name}.yaml"))
    values = {k: v for k, v in values.items() if k != "defaults"}
    task = Image(**values | {"limit": {"train": 300, "val": 1, "test": 200}})
    rows, processor = task.load(config.data), built(config).processor
    fit, test = (Encoded(rows.splits[s], task, processor) for s in ("train", "test"))
    source = {k: rows.source[k] for k in ("licence", "standin")} | {"fingerprint": rows.source["fingerprints"]["test"]}
    label = f"{task.path}{' (stand-in)' if rows.source['standin'] else ''}"
    about = {"text": label, "from": rows.source["kind"], "rows": len(test), "kind": "probe"}
    return Yardstick("accuracy", lambda model: probe(*_features(model, fit), *_features(model, test)), source | about)


@torch.inference_mode()
def _features(model: Any, rows: Any, batch: int = 50) -> tuple[Tensor, Tensor]:
    """(rows, width) means over the positions of the last hidden state, float64, and the labels."""
    own, training = backbone(model), model.training
    own.eval()
    like = next(own.parameters())
    found, labels = [], []
    for i in range(0, len(rows), batch):
        part = rows.batch(list(range(i, min(i + batch, len(rows)))))
        states = own(pixel_values=part["pixel_values"].to(like.device)).last_hidden_state
        found.append(states.flatten(1, -2).mean(1).cpu().double())
        labels.append(part["labels"])
    model.train(training)
    return torch.cat(found), torch.cat(labels)


def probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Accuracy of ridge regression onto one-hot labels y (rows,) from standardised features x (rows, width)."""
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-9)
    x, x_test = ((t - mean) / spread for t in (x, x_test))
    targets = nn.functional.one_hot(y, int(max(y.max(), y_test.max())) + 1).double()
    gram = x.T @ x + 0.1 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    solved = torch.linalg.solve(gram, x.T @ (targets - targets.mean(0)))
    return float(((x_test @ solved + targets.mean(0)).argmax(1) == y_test).double().mean())
