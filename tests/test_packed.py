"""Packed batches: the outputs and gradients of padded ones for every method, no row in another, and whole runs that say so."""

import itertools

import pandas as pd
import pytest
import torch
from torch import nn

from analysis import Mixed, pareto
from bench import packed, padding, random_models
from bench.config import compose
from bench.evaluate import evaluate
from bench.layout import Layout, current, recomputing
from bench.packed import install, stack
from bench.prepare import prepare
from bench.random_models import random_model
from bench.run import run
from bench.train import to_device
from methods import METHODS, Unsupported
from methods.base import Adapted
from tests.test_methods import make, perturb

KINDS = ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "phi3")
DECODERS = ("gpt2", "llama", "qwen2", "phi3", "gemma3")
SOME = ("lora", "full_ft", "houlsby", "prefix_tuning", "prompt_tuning", "ia3", "lst", "dylora")  # elsewhere than all
LENGTHS = (10, 7, 3, 3, 3, 9, 9, 1)
CLOSE = dict(rtol=1e-5, atol=1e-5)


def batch_of(kind, lengths=LENGTHS, left=False):
    ids = torch.randint(3, 384, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    place = torch.arange(ids.shape[1]).expand_as(ids)
    mask = (place < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    labels = ids.masked_fill(mask == 0, -100) if kind in DECODERS else (ids[:, 0] > 190).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def outputs(model, batch, penalty=lambda model: 0.0):
    """Loss, logits of real rows and tokens, gradients; the layout that the blocks saw."""
    seen = []
    hook = stack(model)[0][-1].register_forward_hook(lambda *_: seen.append(current()))
    model.zero_grad()
    torch.manual_seed(3)
    out = model(**batch)
    (out.loss + penalty(model)).backward()
    hook.remove()
    logits = out.logits.detach()
    if logits.dim() == 3:
        logits = logits[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), logits, gradients, seen[0]


def assert_packed_is_padded(model, batch, penalty=lambda model: 0.0):
    before = outputs(model, batch, penalty)
    undo = install(model)
    after = outputs(model, batch, penalty)
    undo.close()
    assert before[3] is None and after[3].tokens == batch["attention_mask"].sum() + extra(model) * len(LENGTHS)
    assert before[2].keys() == after[2].keys() and before[2]
    torch.testing.assert_close(after[:3], before[:3], **CLOSE)


def extra(model):
    """Tokens that a prompt puts in front of a row."""
    return next((m.length for m in model.modules() if type(m).__name__ == "Prompt"), 0)


@pytest.mark.parametrize(
    "kind, name",
    [
        (kind, name)
        for kind, name in itertools.product(KINDS, sorted(METHODS))
        if not METHODS[name].untrained and (kind in ("bert", "llama") or name in SOME)
    ],
)
def test_every_method_gives_what_it_gives_padded(kind, name):
    torch.manual_seed(0)
    method, batch = make(name), batch_of(kind)
    try:
        model = method.apply(random_model(kind), itertools.repeat(batch))
    except Unsupported as reason:
        pytest.skip(str(reason))
    perturb(model)
    assert_packed_is_padded(model.eval(), batch, method.penalty)


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_together_as_on_a_gpu(kind, monkeypatch):
    monkeypatch.setattr(packed, "together", lambda *_: True)
    model = METHODS["prefix_tuning"](hidden=16).apply(random_model(kind), []) if kind != "phi3" else random_model(kind)
    perturb(model)
    assert_packed_is_padded(model.requires_grad_(), batch_of(kind))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_on_the_left(kind):
    model, batch = random_model(kind), batch_of(kind, left=True)
    real, logits = batch.pop("attention_mask").bool(), []
    for pack in (lambda _: None, install):
        pack(model)
        logits.append(model(batch["input_ids"], attention_mask=real.long()).logits[real])
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("window", [2, 64])
def test_windows(window):
    """Shorter than most rows, and longer than all."""
    import transformers

    tiny = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        **tiny, intermediate_size=64, vocab_size=384, sliding_window=window, layer_types=types
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    assert_packed_is_padded(model, batch_of("gemma3"))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_no_row_sees_another(kind):
    model, batch = random_model(kind), batch_of(kind)
    install(model)
    found = []
    model.get_input_embeddings().register_forward_hook(lambda *a: found.append(a[2].requires_grad_()))
    model(**batch).logits[1].sum().backward()
    reached = found[0].grad.abs().sum((1, 2)) > 0
    assert reached.tolist() == [False, True] + [False] * 6


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_gradient_checkpointing(kind):
    model, batch = METHODS["lora"]().apply(random_model(kind), []), batch_of(kind)
    perturb(model)
    install(model)
    plain = outputs(model.train(), batch)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputing})
    torch.testing.assert_close(outputs(model, batch)[:3], plain[:3])
    assert current() is None


def test_generation_is_as_without():
    model = METHODS["lst"](reduction=2, fisher_samples=1, start="random").apply(random_model("llama"), [])
    batch = {k: v for k, v in batch_of("llama", left=True).items() if k != "labels"}
    plain = model.generate(**batch, max_new_tokens=5, do_sample=False)
    install(model)
    assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), plain)


def test_a_batch_without_padding_and_an_error_leave_nothing_behind():
    model, batch = random_model("bert"), batch_of("bert")
    install(model)
    assert outputs(model.requires_grad_(), batch_of("bert", (5, 5)))[3] is None
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 1000, attention_mask=batch["attention_mask"])
    assert current() is None


def test_undone_it_is_the_model_that_it_was():
    model = random_model("llama")
    before = {
        n: {k: list(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for n, m in model.named_modules()
    }
    name = model.config._attn_implementation
    install(model).close()
    assert model.config._attn_implementation == name
    assert {
        n: {k: list(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for n, m in model.named_modules()
    } == before


def test_layout():
    mask = batch_of("bert", (3, 1, 1, 0, 2))["attention_mask"]
    layout = Layout.of(mask)
    assert layout.offsets == [0, 3, 4, 5, 5, 7] and layout.tokens == 7
    assert (layout.places // layout.width).tolist() == [0, 0, 0, 1, 2, 4, 4]
    assert (layout.places % layout.width).tolist() == [0, 1, 2, 0, 0, 0, 1]
    assert layout.groups == [(1, 3), (2, 1), (1, 2)]
    x = torch.randn(5, 3, 2)
    assert torch.equal(layout.unpack(layout.pack(x)), x * mask[..., None])
    assert Layout.of(torch.ones(2, 3)) is None


def test_a_mask_on_a_device_keeps_the_hosts():
    batch = batch_of("bert")
    assert to_device(batch, torch.device("meta"))["attention_mask"].host is batch["attention_mask"]
    assert not hasattr(to_device(batch, torch.device("cpu"))["attention_mask"], "host")
    assert Layout.of(batch["attention_mask"].to("meta"), batch["attention_mask"]).lengths == list(LENGTHS)


class Mixing(Adapted):
    """What no method here does: each token is added to the one behind it."""

    def __init__(self, base):
        super().__init__(base)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.base(x) + self.gate * self.base(x).roll(1, dims=1)


def config(tmp_path, *overrides, model="bert", task="sst2"):
    fixed = [f"task={task}", "data=standin", "wandb=off", "isolate=false", "train.batch_size=8", "train.lr=1e-2"]
    rows = "task.limit={train: 30, val: 12, test: 12}"
    return compose(["method=lora", f"model.path=random:{model}", *fixed, rows, f"results={tmp_path}", *overrides])


def losses(record):
    return [h["train/loss"] for h in record.history if "train/loss" in h]


@pytest.mark.parametrize("model, task", [("bert", "sst2"), ("llama", "boolq_choice"), ("llama", "sst2")])
def test_a_whole_run(tmp_path, model, task):
    records, tables = [], []
    for kind in ("auto", "padded"):
        record = run(config(tmp_path / kind, f"train.padding={kind}", model=model, task=task))
        assert record.status == "ok", record.traceback
        records.append(record)
        tables.append(pd.read_parquet(tmp_path / kind / record.id / "predictions.parquet"))
    auto, padded = records
    assert auto.model_source["padding"] == {"kind": "packed"}
    assert padded.model_source["padding"] == {"kind": "padded", "reason": "train.padding=padded"}
    torch.testing.assert_close(losses(auto), losses(padded), **CLOSE)
    assert tables[0].drop(columns="score").equals(tables[1].drop(columns="score"))
    assert (tables[0]["score"] - tables[1]["score"]).abs().max() < 1e-4
    assert auto.flops["total_train"] < padded.flops["total_train"]
    assert auto.memory["activations"] < padded.memory["activations"]
    assert evaluate(tmp_path / "auto" / auto.id)["changed"] == 0


def test_dropout_repeats_bit_for_bit(tmp_path, monkeypatch):
    dropout = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    monkeypatch.setitem(random_models.RANDOM, "bert", random_models.RANDOM["bert"] | dropout)
    once, again = (run(config(tmp_path / name)) for name in "ab")
    assert once.model_source["padding"]["kind"] == "packed"
    assert losses(once) == losses(again) and once.metrics == again.metrics
    assert losses(once) != losses(run(config(tmp_path / "c", "train.padding=padded")))


@pytest.mark.parametrize(
    "overrides, model, reason",
    [
        ([], "deberta", "attention interface"),
        ([], "t5", "encoder-decoder"),
        (["model.attention=eager"], "bert", None),
        (["task=digits"], "vit", "images are not padded"),
        (["method=hf", "method.type=PREFIX_TUNING"], "llama", "cache"),
    ],
)
def test_what_cannot_be_packed_says_why(tmp_path, overrides, model, reason):
    chosen = ["task=boolq_choice"] if "method=hf" in overrides else []
    configured = config(tmp_path, *chosen, *overrides, model=model)
    ready = prepare(configured, configured.task.load(configured.data, 0), torch.device("cpu"))
    if reason is None:
        assert ready.packed  # a random model does not read model.attention
        return
    assert not ready.packed and reason in ready.source["padding"]["reason"]
    configured.train.padding = "packed"
    with pytest.raises(Unsupported, match=r"train\.padding=packed: .*; train\.padding=auto or padded runs it padded"):
        prepare(configured, configured.task.load(configured.data, 0), torch.device("cpu"))


def test_a_method_that_mixes_positions_is_left_padded(tmp_path):
    configured = config(tmp_path)
    apply = configured.method.apply

    def mixing(model, batches):
        model = apply(model, batches)
        layer = model.bert.encoder.layer[0].output
        layer.dense = Mixing(layer.dense)
        return model

    configured.method.apply = mixing
    ready = prepare(configured, configured.task.load(configured.data, 0), torch.device("cpu"))
    assert ready.source["padding"] == {"kind": "padded", "reason": "packed rows give other states under this method"}
    batch = ready.encoded["train"].batch([0, 1, 2])
    assert outputs(ready.model, batch)[3] is None


def test_rows_of_one_length_are_left_padded(tmp_path, monkeypatch):
    monkeypatch.setattr(padding, "padding_share", lambda *_: 0.004)
    configured = config(tmp_path)
    ready = prepare(configured, configured.task.load(configured.data, 0), torch.device("cpu"))
    assert ready.source["padding"] == {"kind": "padded", "reason": "0.4% of the positions are padding, no more than 1%"}


def test_packed_and_padded_runs_share_no_cost_axis():
    table = pd.DataFrame({"method": ["a", "b"], "score": [1.0, 2.0], "padding": ["packed", "padded"]})
    table = table.assign(trained_params=[1.0, 2.0], flops_total_train=[1.0, 2.0], time_step=[1.0, 2.0])
    pareto(table, "trained_params")
    for cost in ("flops_total_train", "time_step"):
        with pytest.raises(Mixed, match="padding: packed, padded"):
            pareto(table, cost)


def test_an_unknown_padding(tmp_path):
    with pytest.raises(ValueError, match=r"train\.padding='none'.*auto, packed, padded"):
        config(tmp_path, "train.padding=none")
