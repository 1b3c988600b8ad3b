"""What a run costs, against closed forms; and the probe leaves no trace."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.measure import (
    Energy,
    Phases,
    StepTimer,
    environment,
    flops,
    gradient_bytes,
    memory,
    optimizer_bytes,
    out_of_memory,
    probe,
    saved_bytes,
    times,
    weight_bytes,
)


def mlp(hidden: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def test_nested_phases_are_not_counted_twice():
    phases = Phases()
    with phases("train"):
        time.sleep(0.02)
        with phases("eval"):
            time.sleep(0.06)
        time.sleep(0.02)
    assert 0.04 <= phases.seconds["train"] < 0.06 <= phases.seconds["eval"]
    assert phases.total == pytest.approx(sum(phases.seconds.values()))
    assert phases.peaks == {"train": None, "eval": None}


def test_a_phase_is_booked_when_it_raises():
    phases = Phases()
    with pytest.raises(KeyError), phases("train"):
        raise KeyError
    with phases("eval"):
        pass
    assert set(phases.seconds) == {"train", "eval"}


def test_a_resumed_run_adds_up():
    first, second = Phases(), Phases()
    first.seconds, first.peaks = {"train": 5.0}, {"train": 70}
    second.seconds, second.peaks = {"train": 2.0}, {"train": 90}
    second.load_state(json.loads(json.dumps(first.state())))
    assert (second.seconds, second.peaks) == ({"train": 7.0}, {"train": 90})


def test_the_median_step_is_after_the_warm_up_of_every_session():
    steps = StepTimer()
    assert steps.median is None
    steps.load_state(json.loads(json.dumps([[9.0, 9.0, 9.0, 1.0, 2.0]])))
    steps.sessions[-1] += [9.0] * 4 + [3.0] * 36
    assert steps.samples == [1.0, 2.0] + [3.0] * 36
    assert times(Phases(), steps)["step"] == 3.0
    with steps:
        pass
    assert len(steps.sessions[-1]) == 41


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flops_of_a_matrix_product(dtype):
    m, n, k = 5, 7, 3
    a, b = torch.ones(m, k, dtype=dtype, requires_grad=True), torch.ones(k, n, dtype=dtype, requires_grad=True)
    assert flops(lambda: a @ b) == 2 * m * n * k
    assert flops(lambda: (a @ b).sum().backward()) == 3 * 2 * m * n * k
    assert flops(lambda: a @ b[:, 0]) == 2 * m * k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_flops_of_attention_on_a_cpu(dtype, masked):
    b, h, s, d = 2, 4, 16, 8
    q, k, v = (torch.randn(b, h, s, d, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.zeros(b, 1, s, s, dtype=dtype) if masked else None

    def attend():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert flops(attend) == 4 * b * h * s * s * d
    assert flops(lambda: attend().sum().backward()) == (4 + 10) * b * h * s * s * d


def test_flops_of_attention_with_fewer_key_heads():
    q, k = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8)
    assert flops(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)) == 4 * 2 * 4 * 16 * 16 * 8


def test_flops_of_solves_and_transforms():
    a, n = torch.eye(6), 6
    assert flops(lambda: torch.linalg.inv(a)) == 2 * n**3
    assert flops(lambda: torch.linalg.solve(a, torch.ones(n, 2))) == 2 * n**3 // 3 + 2 * n * n * 2
    spectrum = torch.ones(8, 8, dtype=torch.complex64)
    assert flops(lambda: torch.fft.ifft2(spectrum)) == 5 * 64 * 6
    assert flops(lambda: torch.fft.rfft(torch.ones(16))) == 5 * 16 * 4 // 2


def test_saved_bytes_of_an_mlp_by_hand():
    model, x = mlp(), torch.ones(2, 4)
    # of 2 rows: x (4) for the first weight; the ReLU's output (6) for itself and the second weight; the weights not
    assert saved_bytes(model, lambda: model(x).sum()) == 2 * (4 + 6) * 4


def test_frozen_weights_keep_fewer_bytes():
    full, frozen, x = mlp(), mlp(), torch.ones(2, 4)
    frozen.requires_grad_(False)
    frozen[2].weight.requires_grad_(True)
    assert saved_bytes(frozen, lambda: frozen(x).sum()) == 2 * 6 * 4 < saved_bytes(full, lambda: full(x).sum())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_inputs_only(reentrant):
    model, x = mlp(hidden=600), torch.ones(2, 4, requires_grad=True)

    def loss():
        return checkpoint(model, x, use_reentrant=reentrant).sum()

    assert saved_bytes(model, loss) <= 2 * 4 * 4 + 64 < saved_bytes(model, lambda: model(x).sum())


def test_views_count_once():
    weight = nn.Linear(1, 1)
    x = torch.ones(8, requires_grad=True)

    def loss():
        y = x * 1
        return (y[:4] * y[4:]).sum() + (y.view(2, 4) ** 2).sum()

    assert saved_bytes(weight, loss) == 8 * 4


class Stateful(nn.Module):
    """Dropout, batch statistics, a counter, a cache and its own random generators."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.calls, self.shared, self.plain = 0, [], torch.zeros(2)

    def forward(self, x):
        self.calls += 1
        self.shared.append(random.random() + np.random.rand())
        self.plain += 1
        self.cache = self.out(self.drop(self.norm(x)))
        return self.cache


def trace(model: nn.Module) -> dict[str, object]:
    def read(values):
        return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    attributes = {n: read({k: v for k, v in vars(m).items() if k[0] != "_"}) for n, m in model.named_modules()}
    return {
        "attributes": json.dumps(attributes),
        "weights": read(model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "trained": [p.requires_grad for p in model.parameters()],
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
    }


@pytest.mark.parametrize("backward", [True, False])
def test_the_probe_leaves_no_trace(backward):
    model, batch = Stateful(), {"x": torch.randn(5, 4)}
    model.norm.eval()
    model.norm.weight.requires_grad_(False)
    model.out.weight.grad = torch.ones(3, 4)
    model.out.bias.register_post_accumulate_grad_hook(lambda p: pytest.fail("the hook of an optimizer ran"))
    shared, before = model.shared, trace(model)
    cost = probe(model, batch, lambda b: model(b["x"]).sum(), backward=backward)
    assert trace(model) == before
    assert model.shared is shared
    product = 2 * 5 * 4 * 3
    assert cost["forward"] == product
    assert cost["train_step"] == (3 * product if backward else product)
    assert (cost["activations"] > 0) == backward
    assert probe(model, batch, lambda b: model(b["x"]).sum(), backward=backward) == cost


def test_the_probe_restores_after_an_error():
    model = Stateful()
    before = trace(model)
    with pytest.raises(RuntimeError):
        probe(model, {"x": torch.ones(5, 9)}, lambda b: model(b["x"]).sum())
    assert trace(model) == before


def test_bytes_by_kind():
    model = mlp()
    trained = 6 * 3 + 3
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert weight_bytes(model) == 4 * (4 * 6 + 6 + trained)
    assert gradient_bytes(model) == 4 * trained
    assert optimizer_bytes(optimizer) == 0
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert gradient_bytes(model) == 4 * trained
    assert optimizer_bytes(optimizer) == 4 * (2 * trained + 2)  # two moments, and a step count per tensor
    kinds = memory(model, optimizer, Phases(), activations=100)
    assert kinds["peak"] == 4 * (30 + trained) + 4 * trained + 4 * (2 * trained + 2) + 100
    assert kinds["peak_train"] is None


def test_tied_packed_and_quantised_weights_count_as_stored():
    tied = mlp()
    tied.other = nn.Linear(4, 6, bias=False)
    tied.other.weight = tied[0].weight
    assert weight_bytes(tied) == weight_bytes(mlp())
    packed = nn.Module()
    packed.weight = nn.Parameter(torch.zeros(10, dtype=torch.uint8), requires_grad=False)
    packed.weight.quant_state = {"absmax": torch.zeros(2)}
    assert weight_bytes(packed) == 10 + 8


def test_optimizer_bytes_finds_nested_state():
    p = nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([p], momentum=0.9)
    p.grad = torch.ones(3)
    inner.step()
    outer = torch.optim.SGD([p])
    moment = torch.zeros(5)
    outer.state[p] = {"list": [moment, moment[:2]], "deep": {"projection": torch.zeros(7)}, "weight": p.data}
    outer.inner = inner  # type: ignore[attr-defined]
    assert optimizer_bytes(outer) == 4 * (5 + 7 + 3)


def test_the_environment_is_plain_and_names_nobody():
    found = environment("cpu")
    text = json.dumps(found)
    assert found["memory"] == "counted" and found["torch"] == torch.__version__
    assert environment("cpu")["fingerprint"] == found["fingerprint"]
    assert "/home" not in text and "/root" not in text and __file__ not in text
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert environment("cpu")["fingerprint"] != found["fingerprint"]
    torch.set_num_threads(threads)


def test_no_energy_without_a_gpu():
    with Energy("cpu") as energy:
        pass
    assert energy.read() == {}


@pytest.mark.gpu
def test_an_inner_phase_keeps_its_peak_to_itself():
    phases = Phases("cuda")
    with phases("train"):
        with phases("eval"):
            torch.zeros(1 << 20, device="cuda")
        torch.zeros(1 << 10, device="cuda")
    assert phases.peaks["eval"] - phases.peaks["train"] > 3 << 20


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_probe_in_one_pass_agrees_with_each_measure_alone(kind):
    from bench.random_models import random_model

    model = random_model(kind)
    model.requires_grad_(True)
    ids = torch.randint(3, 300, (4, 12))
    labels = ids if kind == "llama" else torch.tensor([0, 1, 0, 1])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    cost = probe(model, batch, lambda b: model(**b).loss)
    model.train()
    assert cost["activations"] == saved_bytes(model, lambda: model(**batch).loss)
    assert cost["train_step"] == flops(lambda: model(**batch).loss.backward())
    with torch.no_grad():
        assert cost["forward"] == flops(lambda: model(**batch).loss)


CPU_FULL = "[enforce fail at alloc_cpu.cpp:{}] {}. DefaultCPUAllocator: {} memory: you tried to allocate 4096 bytes."


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            torch.AcceleratorError(
                "CUDA error: out of memory\nCUDA kernel errors might be reported at some other call"
            ),
            True,
        ),
        (RuntimeError("HIP error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError(CPU_FULL.format(127, "err == 0", "can't allocate")), True),
        (RuntimeError(CPU_FULL.format(114, "data", "not enough")), True),
        (OSError(12, "Cannot allocate memory"), True),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("the memory of the task is out of range"), False),
    ],
)
def test_which_errors_say_that_memory_is_used_up(error, full):
    assert out_of_memory(error) is full


def test_this_machine_says_so_when_asked_for_too_much():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
