"""Products by oneDNN: what torch's own are up to rounding, whatever the layout; and torch's own wherever they do not fit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import matmul
from bench.config import compose
from bench.environment import environment

pytestmark = pytest.mark.skipif(not matmul.available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    before = matmul.used()
    yield
    matmul.use(before)


def by(name: str, compute: object) -> object:
    matmul.use(name)
    assert matmul.used() == name
    return compute()  # type: ignore[operator]


def calls(compute: object) -> int:
    """How many products oneDNN computed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        compute()  # type: ignore[operator]
    return sum(e.count for e in found.key_averages() if e.key == "mkldnn::_linear_pointwise")


def factor(rows: int, columns: int, layout: str) -> Tensor:
    torch.manual_seed(rows + columns)
    if layout == "rows":
        return torch.randn(rows, columns)
    if layout == "columns":
        return torch.randn(columns, rows).t()
    if layout == "expanded":
        return torch.randn(1, columns).expand(rows, columns)
    return torch.randn(rows, 2 * columns)[:, ::2]  # gaps


@pytest.mark.parametrize("left", ["rows", "columns", "expanded", "gaps"])
@pytest.mark.parametrize("right", ["rows", "columns", "expanded", "gaps"])
def test_a_product_is_the_product(left: str, right: str) -> None:
    a, b = factor(48, 160, left), factor(160, 256, right)
    matmul.use("onednn")
    fits = {left, right} <= {"rows", "columns"}
    assert calls(lambda: a @ b) == fits
    exact = a.double() @ b.double()
    assert torch.allclose((a @ b).double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


def test_a_layer_and_its_gradients() -> None:
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 60, 160), (256, 160), (256,)))

    def gradients() -> list[Tensor]:
        y = F.linear(x, w, b)
        return [y, *torch.autograd.grad(y.square().mean(), (x, w, b))]

    for found, expected in zip(by("onednn", gradients), by("torch", gradients), strict=True):  # type: ignore[call-overload]
        assert torch.allclose(found, expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))
    matmul.use("onednn")
    assert calls(gradients) == 3  # forward, by x, by w


def test_a_row_is_the_same_beside_others() -> None:
    """What trains together (`fused.py`) and what is padded less must not differ by the number of rows."""
    matmul.use("onednn")
    x, w, b = torch.randn(300, 160), torch.randn(256, 160), torch.randn(256)
    whole = F.linear(x, w, b)
    for rows in (2, 3, 17, 64, 299):
        assert torch.equal(F.linear(x[:rows], w, b), whole[:rows]), rows


@pytest.mark.parametrize("rows", [70, 80, 299])
def test_a_multiple_of_rows_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matmul.use("onednn")
    x, g, w, b = torch.randn(rows, 160), torch.randn(rows, 256), torch.randn(256, 160), torch.randn(256)

    def products() -> list[Tensor]:
        return [F.linear(x, w, b), g @ w, g.t() @ x]  # forward, by x, by w

    longer, added = matmul._longer, []
    monkeypatch.setattr(matmul, "_longer", lambda x, more: added.append(more) or longer(x, more))
    found = products()
    assert added == ([] if rows == 80 else [-rows % 16] * 4)  # both factors of the last
    monkeypatch.setattr(matmul, "MANY", rows + 1)
    assert all(map(torch.equal, found, products()))
    assert [t.untyped_storage().nbytes() for t in found] == [t.nbytes for t in found]


def test_the_narrow_factor_is_turned_round() -> None:
    """Of the two that a weight's gradient sums over, whichever comes first; its transpose is the same product."""
    matmul.use("onednn")
    g, x = torch.randn(300, 256), torch.randn(300, 160)
    found = g.t() @ x
    assert found.is_contiguous() and torch.equal(found, (x.t() @ g).t())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        g.t() @ x
    assert [e.input_shapes[0] for e in profile.events() if e.name == "mkldnn::_linear_pointwise"] == [[160, 304]]


def test_small_products_are_torchs() -> None:
    """Narrow layers with few rows, whose time is that of a call; the gradient of a weight counts what it sums over."""
    matmul.use("onednn")
    x, narrow, wide = factor(300, 48, "rows"), factor(48, 48, "rows"), factor(48, 96, "rows")
    assert calls(lambda: x @ narrow) == 0 and calls(lambda: x @ wide) == 1
    sums = [calls(lambda n=n: factor(48, n, "columns") @ factor(n, 96, "rows")) for n in (60, 600)]
    assert sums == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_torchs(dtype: torch.dtype) -> None:
    a, b = factor(48, 160, "rows").to(dtype), factor(160, 256, "rows").to(dtype)
    assert torch.equal(by("onednn", lambda: a @ b), by("torch", lambda: a @ b))  # type: ignore[arg-type]


def test_other_sums_are_torchs() -> None:
    a, b, c = factor(48, 160, "rows"), factor(160, 256, "rows"), torch.randn(48, 256)
    assert torch.equal(*(by(n, lambda: torch.addmm(c, a, b, beta=0.5, alpha=2)) for n in ("onednn", "torch")))  # type: ignore[arg-type]
    matmul.use("onednn")
    assert calls(lambda: torch.addmm(c, a, b)) == 0  # what is added differs from row to row


def test_errors_are_torchs() -> None:
    matmul.use("onednn")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.randn(48, 161) @ torch.randn(160, 256)
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.randn(48, 160, dtype=torch.float64) @ torch.randn(160, 256)


def test_it_is_given_back() -> None:
    a, b = factor(48, 160, "rows"), factor(160, 256, "rows")
    matmul.use("onednn")
    assert calls(lambda: a @ b) == 1
    matmul.use("torch")
    assert calls(lambda: a @ b) == 0


def test_the_environment_says_so_and_its_fingerprint_differs() -> None:
    found = [by(name, environment) for name in ("onednn", "torch")]
    assert [e["matmul"] for e in found] == ["onednn", "torch"]  # type: ignore[index]
    assert found[0]["fingerprint"] != found[1]["fingerprint"]  # type: ignore[index]


def test_auto_is_onednn_where_mkl_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for narrow, expected in ((True, "onednn"), (False, "torch")):
        monkeypatch.setattr(matmul, "_narrow", lambda narrow=narrow: narrow)
        matmul.use("auto")
        assert matmul.used() == expected


def test_a_torch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "available", lambda: False)
    matmul.use("auto")
    assert matmul.used() == "torch"
    with pytest.raises(ValueError, match=r"matmul=onednn: .* use matmul=auto or matmul=torch"):
        matmul.use("onednn")


def test_a_misspelled_choice() -> None:
    with pytest.raises(Exception, match="matmul='mkl': the options are auto, onednn, torch"):
        compose(["method=lora", "task=rte", "matmul=mkl"])
