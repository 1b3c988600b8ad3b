"""Kept features: the same run as without, dropout of frozen blocks off in both, never a damaged file, never where it is wrong."""

import copy
import dataclasses
import logging

import pandas as pd
import pytest
import torch
from torch import nn

from bench import encoded_cache, features, random_models
from bench.clock import Phases
from bench.config import TrainConfig, compose
from bench.features import Features
from bench.lookup import Lookup
from bench.measure import mark_cached
from bench.prefix import find, keep_evaluating, train_mode
from bench.prepare import prepare
from bench.random_models import random_model
from bench.record import Record, identity
from bench.run import run
from bench.train import Loop, Stop
from methods import METHODS
from methods.base import reads

CPU = torch.device("cpu")
TASKS = {"vit": "digits", "llama": "sst2", "bert": "sst2"}
OPTIONS = {
    "telly": ["method.blocks=1"],
    "lst": ["method.reduction=2", "method.drop=0", "method.fisher_samples=4", "train.lr=0.01"],
}
DROPOUT = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PARETUNE_ENCODED_GB", raising=False)
    encoded_cache._opened.cache_clear()


@pytest.fixture
def dropout(monkeypatch):
    for kind in ("bert", "vit"):
        monkeypatch.setitem(random_models.RANDOM, kind, random_models.RANDOM[kind] | DROPOUT)


def config(tmp_path, *overrides, model="bert", method="linear_probe", kept="auto"):
    fixed = [f"task={TASKS.get(model, 'sst2')}", "data=standin", "wandb=off", "isolate=false", "train.batch_size=8"]
    rows = "task.limit={train: 30, val: 12, test: 12}"
    chosen = [
        f"method={method}",
        *OPTIONS.get(method, []),
        f"model.path=random:{model}",
        f"train.features={kept}",
        f"results={tmp_path / kept}",
    ]
    return compose([*fixed, rows, *chosen, *overrides])


def files():
    return sorted(encoded_cache.folder().glob("features-*.arrow"))


def pair(tmp_path, *overrides, **chosen):
    """Records and predictions without and with kept features."""
    found = []
    for kept in ("off", "auto"):
        record = run(config(tmp_path, *overrides, kept=kept, **chosen))
        assert record.status == "ok", record.traceback
        table = pd.read_parquet(tmp_path / kept / record.id / "predictions.parquet")
        found.append((record, table))
    return found


def assert_same(plain, kept):
    (a, before), (b, after) = plain, kept
    values = [[(h["step"], h["train/loss"]) for h in r.history if "train/loss" in h] for r in (a, b)]
    assert len(values[0]) == a.steps and [s for s, _ in values[0]] == [s for s, _ in values[1]]
    assert max(abs(x - y) for (_, x), (_, y) in zip(*values, strict=True)) < 1e-6
    assert before["prediction"].equals(after["prediction"]) and a.score == pytest.approx(b.score, rel=1e-6)
    assert (before["score"] - after["score"]).abs().max() < 1e-5


@pytest.mark.parametrize("method, model", [(m, k) for m in ("linear_probe", "telly", "lst") for k in TASKS])
def test_a_run_on_kept_features_is_the_same_run(method, model, tmp_path, dropout):
    plain, kept = pair(tmp_path, model=model, method=method)
    assert_same(plain, kept)
    assert plain[0].data.get("features") is None and len(files()) == 3
    assert kept[0].data["features"]["states"] == (1 if method != "lst" else 3 if model == "vit" else 2)
    assert kept[0].model_source["evaluation_mode"] == plain[0].model_source["evaluation_mode"] != []


@pytest.mark.parametrize("method", ["linear_probe", "lst"])
def test_a_padded_run(method, tmp_path):
    plain, kept = pair(tmp_path, "train.epochs=2", "train.padding=padded", model="llama", method=method)
    assert_same(plain, kept)
    assert kept[0].model_source["padding"]["kind"] == "padded" and kept[0].data["features"]


@pytest.mark.parametrize("model", ["distilbert", "gpt2", "deit"])
def test_a_ladder_beside_other_architectures(model, tmp_path):
    """One side block, beside the second of the blocks."""
    options = ["train.epochs=2", "method.drop=2", *(["task=digits"] if model == "deit" else [])]
    plain, kept = pair(tmp_path, *options, model=model, method="lst")
    assert_same(plain, kept)
    states = 2 if model == "deit" else 1  # pixels are not kept: what is made of them is
    assert kept[0].data["features"] | {"states": states, "positions": "all"} == kept[0].data["features"]


@pytest.mark.parametrize("model", ["roberta", "deberta", "distilbert", "qwen2", "gpt2", "t5"])
def test_other_architectures(model, tmp_path):
    plain, kept = pair(tmp_path, "train.epochs=2", model=model)
    assert_same(plain, kept)
    assert kept[0].data["features"]["positions"] == ("all" if model in ("qwen2", "gpt2", "t5") else "first")


@pytest.mark.parametrize("method", ["telly", "lst"])
def test_generation_trains_on_kept_features_and_scores_without(method, tmp_path):
    plain, kept = pair(tmp_path, "task=gsm8k_brief", "train.epochs=2", model="llama", method=method)
    assert_same(plain, kept)
    assert len(files()) == 1  # of train


def test_accumulation_and_half_precision(tmp_path):
    plain, kept = pair(tmp_path, "train.accumulate=2", "train.precision=bf16", "train.epochs=2")
    losses = [[h["train/loss"] for h in r.history if "train/loss" in h] for r, _ in (plain, kept)]
    assert torch.tensor(losses[0]).sub(torch.tensor(losses[1])).abs().max() < 1e-2
    assert kept[0].data["features"] and plain[1]["prediction"].equals(kept[1]["prediction"])


@pytest.mark.parametrize("method", ["linear_probe", "lst"])
def test_the_prefix_does_not_run_on_kept_features(method, tmp_path):
    ready, _ = ready_with_features(tmp_path, method=method)
    runs = []
    for block in ready.model.bert.encoder.layer:
        block.attention.register_forward_hook(lambda *_: runs.append(1))
    ready.model(**ready.encoded["train"].batch([0, 1, 2]))
    assert not runs
    batch = ready.encoded["train"].batch([0, 1, 2])
    del batch["features"]
    ready.model(**batch)
    assert len(runs) == 2  # what brings no features is computed


def ready_with_features(tmp_path, *overrides, **chosen):
    cfg = config(tmp_path, *overrides, **chosen)
    ready = prepare(cfg, cfg.task.load(cfg.data), CPU)
    return ready, features.use(ready, cfg, Phases(), Stop())


def test_dropout_of_frozen_blocks_is_off_in_every_training_and_that_of_the_head_is_on(dropout):
    torch.manual_seed(0)
    model = METHODS["linear_probe"]().apply(random_model("bert"), iter(()))
    for p in model.bert.pooler.parameters():
        p.requires_grad_(False)  # as in a checkpoint that has one
    batch = batch_of(model)
    keep_evaluating(model, batch)
    seen = {}
    loop = Loop(model, METHODS["linear_probe"](), TrainConfig(lr=1e-3), steps=2, device=CPU)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: seen.setdefault(name, []).append((m.training, o)))
    loop.step([batch])
    loop.step([batch])
    assert not any(training for name in seen if name.startswith("bert.") for training, _ in seen[name])
    assert all(training for training, _ in seen["dropout"] + seen["classifier"])
    (_, first), (_, again) = seen["bert.pooler"]
    assert torch.equal(first, again)
    assert not torch.equal(seen["dropout"][0][1], seen["dropout"][1][1])


def test_what_is_trained_above_frozen_blocks_keeps_its_dropout(dropout):
    model = METHODS["telly"](blocks=1).apply(random_model("bert"), iter(()))
    prefix = keep_evaluating(model, batch_of(model))
    train_mode(model)
    assert (
        list(prefix.below) == ["bert.embeddings", "bert.encoder.layer.0"] and not model.bert.embeddings.dropout.training
    )
    assert model.bert.encoder.layer[1].output.dropout.training and model.dropout.training


def batch_of(model, rows=2):
    ids = torch.randint(3, 300, (rows, 7), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.zeros(rows, dtype=torch.long))


BELOW = (
    "full_ft",
    "bitfit",
    "ln_tuning",
    "lora",
    "houlsby",
    "prefix_tuning",
    "prompt_tuning",
    "lisa",
    "hft",
    "ia3",
)


@pytest.mark.parametrize("method", BELOW)
def test_methods_that_touch_the_first_block_have_no_prefix(method):
    model = random_model("bert")
    batch = batch_of(model)
    assert find(METHODS[method]().apply(model, iter([batch] * 50)), batch) is None


def test_a_run_without_a_prefix_says_so_and_goes_on(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    record = run(config(tmp_path, "train.epochs=2", method="lora"))
    assert record.status == "ok" and record.data["features"] is None and not files()
    assert record.model_source["evaluation_mode"] == [] and record.time["step"] is not None
    assert "no features are kept" in caplog.text


def train_embeddings(model):
    model.bert.embeddings.word_embeddings.weight.requires_grad_()


def hook_a_block(model):
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda m, a, o: o)


def hook_the_model(model):
    model.register_forward_pre_hook(lambda m, a: a)


def override_a_forward(model):
    model.bert.embeddings.forward = model.bert.embeddings.forward


def let_a_block_rest(model):
    for p in model.bert.encoder.layer[0].parameters():
        p.resting = True


def hook_and_read_inside_a_block(model):
    model.bert.encoder.layer[0].attention.register_forward_hook(reads(lambda m, a, o: None))


def use_a_block_twice(model):
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]


CHANGES = (train_embeddings, hook_a_block, hook_the_model, override_a_forward, let_a_block_rest, use_a_block_twice)
CHANGES += (hook_and_read_inside_a_block,)


def test_nothing_is_frozen_that_a_method_may_touch():
    model = random_model("bert")
    assert find(model, batch_of(model)) is not None
    for change in CHANGES:
        changed = copy.deepcopy(model)
        change(changed)
        assert find(changed, batch_of(model)) is None, change.__name__


def test_hooks_that_only_read_a_block_say_what_is_read():
    model = random_model("bert")
    blocks = model.bert.encoder.layer
    assert find(model, batch_of(model)).read == [3]  # of two blocks and the pooler
    blocks[1].register_forward_pre_hook(reads(lambda m, a: None))
    assert find(model, batch_of(model)).read == [1, 3]
    blocks[0].register_forward_pre_hook(reads(lambda m, a: None))
    blocks[1].register_forward_hook(reads(lambda m, a, o: None))
    assert find(model, batch_of(model)).read == [0, 1, 2, 3]


def test_a_decoder_follows_its_encoder_where_both_are_frozen():
    """One dropout of T5 stands before the decoder's blocks and behind them: it is trained nowhere, or what follows it is."""
    model = random_model("t5")
    batch = batch_of(model)
    batch["labels"] = batch["input_ids"]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # of its own, and trained
    for p in model.parameters():
        p.requires_grad_(p is model.lm_head.weight)
    names = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1", "decoder.final_layer_norm"]
    prefix = find(model, batch)
    assert prefix.names == names and prefix.read == [5] and prefix.rest[0] == (None, None)
    model.decoder.block[1].layer[0].layer_norm.weight.requires_grad_()
    assert find(model, batch) is None  # that dropout is of what is trained


def test_a_ladder_beside_an_encoder_and_a_decoder_has_no_prefix():
    """The decoder's blocks follow a side encoder that is trained, and the two stacks have positions of their own."""
    model = random_model("t5")
    batch = batch_of(model)
    batch["labels"] = batch["input_ids"]
    model = METHODS["lst"](reduction=2, fisher_samples=2).apply(model, iter([batch] * 2))
    assert find(model, batch) is None


def test_finding_leaves_no_trace():
    model = random_model("bert")
    model.train()
    state, flags = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    find(model, batch_of(model))
    assert torch.equal(state, torch.get_rng_state()) and flags == [p.requires_grad for p in model.parameters()]
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_a_model_that_reads_a_block_in_between_is_found_out(tmp_path, monkeypatch, caplog):
    """What is trained reads the sum of both blocks, at start with weights of zero, which hide it."""
    caplog.set_level(logging.INFO)
    cfg = config(tmp_path, model="distilbert")
    ready = prepare(cfg, cfg.task.load(cfg.data), CPU)
    nn.init.zeros_(ready.model.classifier.weight)
    stack = ready.model.distilbert.transformer
    inner, outputs = type(stack).forward, []
    monkeypatch.setattr(type(stack.layer[0]), "forward", noting(type(stack.layer[0]).forward, outputs))

    def reading(self, *args, **kwargs):
        outputs.clear()
        output = inner(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + (
            outputs[0] if len(outputs) == 2 else kwargs["hidden_states"]
        )
        return output

    monkeypatch.setattr(type(stack), "forward", reading)
    assert features.use(ready, cfg, Phases(), Stop()) is None
    assert "reads more than the output" in caplog.text


def noting(forward, outputs):
    def noted(self, *args, **kwargs):
        outputs.append(forward(self, *args, **kwargs))
        return outputs[-1]

    return noted


def test_a_damaged_file_is_computed_again(tmp_path, caplog):
    (_, before), _ = pair(tmp_path)
    for file in files():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    encoded_cache._opened.cache_clear()
    record = run(dataclasses.replace(config(tmp_path), force=True))
    after = pd.read_parquet(tmp_path / "auto" / record.id / "predictions.parquet")
    assert caplog.text.count("checksum") == 3 and before["prediction"].equals(after["prediction"])


def test_features_are_computed_once_for_runs_that_differ_in_what_is_trained(tmp_path, monkeypatch):
    run(config(tmp_path))
    asked = []
    monkeypatch.setattr("bench.features_compute.Computing._chunk", lambda *a: asked.append(a))
    assert run(config(tmp_path, "train.lr=0.1")).status == "ok" and not asked


@pytest.mark.parametrize("change", ["seed=1", "train.precision=bf16", "model=distilbert"])
def test_other_weights_or_precision_have_other_files(tmp_path, change):
    ready_with_features(tmp_path)
    before = files()
    ready_with_features(tmp_path)
    assert files() == before
    if change == "model=distilbert":
        ready_with_features(tmp_path, model="distilbert")
    else:
        ready_with_features(tmp_path, change)
    assert len(files()) == 2 * len(before)


def test_the_bound_is_respected(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("PARETUNE_ENCODED_GB", "1e-6")
    record = run(config(tmp_path, model="llama"))
    assert record.status == "ok" and record.data["features"] is None and not files()
    assert "PARETUNE_ENCODED_GB" in caplog.text


def test_one_epoch_keeps_nothing(tmp_path):
    record = run(config(tmp_path, "train.epochs=1"))
    assert "features" not in record.data and not files() and record.time["step"] is not None


def test_changed_frozen_weights_are_an_error(tmp_path):
    ready, found = ready_with_features(tmp_path)
    assert found is not None
    batch = ready.encoded["train"].batch([0, 1])
    ready.model(**batch)
    with torch.no_grad():
        ready.model.bert.encoder.layer[0].output.dense.weight.mul_(2)
    with pytest.raises(RuntimeError, match="frozen weights were changed"):
        ready.model(**batch)


def test_a_model_that_no_longer_calls_its_prefix_is_an_error(tmp_path):
    ready, _ = ready_with_features(tmp_path, model="llama")
    ready.model.model.norm.forward = nn.Identity().forward
    with pytest.raises(RuntimeError, match=r"model\.norm was not called"):
        ready.model(**ready.encoded["train"].batch([0, 1]))


def test_the_costs_of_cached_steps_are_in_no_published_column(tmp_path):
    (plain, _), (kept, _) = pair(tmp_path)
    assert kept.flops == plain.flops and kept.memory == plain.memory  # of the method
    assert all(kept.time[name] is None for name in ("step", "train", "eval", "total"))
    assert kept.time["cached_step"] > 0 and kept.time["features"] > 0 and plain.time["features"] is None
    assert not any("cached" in name for name in (*plain.time, *plain.memory, *plain.energy))


def test_the_peak_of_a_gpu_is_marked_too():
    phases = Phases()
    phases.seconds["features"], phases.device = 1.0, torch.device("cuda")
    record = Record("", "m", "m", "t", 0, {}, memory={"peak": 5, "peak_train": 5, "weights": 3}, energy={"joules": 2.0})
    mark_cached(record, phases)
    assert record.memory["peak"] is None and record.memory["cached_peak"] == 5 and record.memory["weights"] == 3
    assert record.energy == {"joules": None, "cached_joules": 2.0}


def test_a_run_without_kept_features_has_its_old_name(tmp_path):
    plain = {"train": {"lr": 1e-3}, "task": {}, "seed": 0}
    off, auto = ({**plain, "train": {"lr": 1e-3, "features": f}} for f in ("off", "auto"))
    assert identity(plain, {}) == identity(off, {}) != identity(auto, {})
    with pytest.raises(ValueError, match="the options are off, auto"):
        TrainConfig(features="on")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit(dtype, tmp_path):
    ready, _ = ready_with_features(tmp_path, model="llama")
    if dtype != torch.float32:
        cfg = config(tmp_path, model="llama")
        ready = prepare(cfg, cfg.task.load(cfg.data), CPU)
        ready.model.to(dtype)
        features.use(ready, cfg, Phases(), Stop())
    encoded = ready.encoded["val"]
    assert isinstance(encoded.features, Features)
    batch = encoded.batch([5, 3])
    mask = batch["attention_mask"].bool()
    tokens = batch.pop("features")
    assert tokens.dtype == dtype and tokens.shape == (1, mask.sum(), 32)
    encoded.features.packed = False
    (given,) = encoded.batch([5, 3])["features"]
    assert given.dtype == dtype and given.shape == (*mask.shape, 32) and torch.equal(given[mask], tokens[0])
    with torch.inference_mode():
        expected = ready.model.eval().model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
    torch.testing.assert_close(
        given[mask],
        expected[mask],
        rtol=1e-5 if dtype == torch.float32 else 3e-2,
        atol=3e-2 if dtype != torch.float32 else 1e-5,
    )
    assert not given[~mask].any()


@pytest.mark.parametrize("rows", [[0], [3, 3], [0, 1, 2, 3]])
def test_packed_features_without_and_with_padding_beside_them(rows, tmp_path):
    """Packed features of rows of one length meet a forward that is not packed, as nothing is padded."""
    ready, _ = ready_with_features(tmp_path, model="llama", method="lst")
    assert ready.packed
    batch = ready.encoded["train"].batch(rows)
    assert batch["features"].shape[:2] == (2, batch["attention_mask"].sum())
    with torch.no_grad():
        found = ready.model.eval()(**batch).logits
        del batch["features"]
        torch.testing.assert_close(found, ready.model(**batch).logits, rtol=1e-5, atol=1e-6)


def test_an_interrupted_computation_leaves_no_file(tmp_path):
    cfg = config(tmp_path)
    ready = prepare(cfg, cfg.task.load(cfg.data), CPU)
    stop = Stop()
    stop.requested = "SIGTERM"
    with pytest.raises(Exception, match="stopped by SIGTERM"):
        features.use(ready, cfg, Phases(), stop)
    assert not list(encoded_cache.folder().glob("*features*.arrow*"))


def test_lookup_restores_what_the_prefix_returns(tmp_path):
    """DeBERTa's blocks return pairs."""
    model = random_model("deberta")
    batch = batch_of(model)
    lookup = Lookup(model.eval(), find(model, batch))
    (hidden,), expected = lookup.compute(batch), model(**batch).logits
    assert torch.equal(model(**batch, features=hidden[None]).logits, expected)
    assert not torch.equal(model(**batch, features=hidden[None] + 1).logits, expected)
