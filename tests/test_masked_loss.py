"""The pseudo-loss on an encoder that has learned English: no packaged one brings its masked-language-model head, so a small
BERT learns here, from the language reference that every Python brings, on other paragraphs than those it is measured on."""

import re
from collections import Counter
from pydoc_data.topics import topics

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from analysis.forgetting import of_run, yardstick
from analysis.forgetting_text import texts
from bench.config import compose
from bench.prepare import find_device, prepare
from bench.record import Record
from bench.run import run
from tasks.data import DataConfig

TASK = ["task=rte", "data=standin", "task.limit={train:32,val:8,test:8}", "task.max_length=32", "wandb=off"]
LENGTH, BATCH = 32, 32


def paragraphs():
    """Those of the reference that the yardstick does not read."""
    held = set(texts(DataConfig("standin"), 24)[0])
    found = (" ".join(p.split()) for topic in sorted(topics) for p in topics[topic].split("\n\n"))
    return [p for p in found if p not in held and len(p.split()) >= 8]


def tokenizer(folder, corpus):
    """The 400 most frequent words, and letters for the rest."""
    counts = Counter(w for p in corpus for w in re.findall(r"\w+|[^\w\s]", p.lower()))
    letters = sorted({c for word in counts for c in word})
    pieces = [*(w for w, _ in counts.most_common(400)), *letters, *(f"##{c}" for c in letters)]
    words = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64)


def learn(model, ids, mask, steps, lr):
    """Masked language modelling (Devlin et al. 2018) on windows of the tokens `ids`, 15 % of them hidden."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        x = ids[torch.randint(0, len(ids) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH)]
        hidden = torch.rand(x.shape) < 0.15
        model(input_ids=x.masked_fill(hidden, mask), labels=x.masked_fill(~hidden, -100)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module", params=[(1, 60, 1e-2), pytest.param((2, 1200, 3e-3), marks=pytest.mark.slow)])
def encoder(request, tmp_path_factory):
    """Folders of the BERT before and after its pretraining, and the loss of the frequencies of its tokens."""
    layers, steps, lr = request.param
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    corpus = paragraphs()
    words = tokenizer(before, corpus)
    ids = torch.tensor([i for p in corpus for i in words(p, add_special_tokens=False, verbose=False)["input_ids"]])
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 128}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, **shape, **still)
    model = BertForMaskedLM(config)
    for folder in (before, after):
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        if folder == before:
            learn(model.train(), ids, words.mask_token_id, steps, lr)
    counts = torch.bincount(ids, minlength=len(words)).double() + 1
    return before, after, -(counts / counts.sum()).log(), steps


def ready(folder, *overrides):
    config = compose([*TASK, f"model.path={folder}", *overrides])
    return config, prepare(config, config.task.load(config.data, 0), find_device(config)).model


def test_an_encoder_that_learns_lowers_the_pseudo_loss(encoder):
    before, after, rare, steps = encoder
    losses = []
    for folder in (before, after):
        config, model = ready(folder, "method=lora")
        found = of_run(model, config)
        assert found["forgetting"] == 0 and found["kind"] == "masked" and "Python" in found["text"]
        losses.append(found["before"])
    assert losses[1] < losses[0] - 1
    if steps > 1000:  # long enough to read the words around the hidden one, and not their frequencies alone
        words = BertTokenizer.from_pretrained(after)
        held = texts(DataConfig("standin"), 24)[0]
        hidden = [i for t in held for i in words(t, truncation=True, max_length=48)["input_ids"][1:-1]]
        assert losses[1] < float(rare[hidden].mean()) - 0.2


def test_tuning_on_a_task_raises_it(encoder, tmp_path):
    """Full fine-tuning, at a rate that destroys; a copy that was put back has forgotten nothing."""
    _, after, _, _ = encoder
    overrides = [f"model.path={after}", "method=full_ft", "train.lr=0.02", "train.steps=12", "train.select=last"]
    record = run(compose([*TASK, *overrides, "train.eval_every=12", "forgetting=true", f"results={tmp_path}"]))
    assert record.status == "ok", record.traceback
    assert Record.load(tmp_path / record.id).forgetting["forgetting"] > 0.03
    config, model = ready(after, "method=full_ft")
    stick = yardstick(model, config)
    kept = {n: t.clone() for n, t in model.base_model.state_dict().items()}
    own = stick.value(model)
    with torch.no_grad():
        for p in model.base_model.parameters():
            p.mul_(0.5)
    assert stick.lost(own, stick.value(model)) > 0.03
    model.base_model.load_state_dict(kept)
    assert stick.lost(own, stick.value(model)) == 0
