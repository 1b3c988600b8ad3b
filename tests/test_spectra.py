"""Spectra of pairs of matrices: planted intruders with known values, nulls, ranks, and the fast path against the full one."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from analysis import decompose, spectra
from analysis import low_rank as update
from analysis.decompose import Svd, cached, full, top
from analysis.gram import Gram
from analysis.low_rank import guess, low_rank
from analysis.spectra import effective_rank, floor, intruders, measure, stable_rank

N = 64
DIAGONAL = torch.diag(torch.arange(N, 0, -1, dtype=torch.float64)) / N
FLAT = torch.ones(N, dtype=torch.float64) / 8


def spiked(strength):
    return DIAGONAL + strength * torch.outer(FLAT, FLAT)


PLANTED = {  # strength: counts at epsilon .2 .3 .4 .5 .6 .7 .8 .9; cosines of vectors 1, 2, 10; largest singular value
    0.0: ([0, 0, 0, 0, 0, 0, 0, 0], [1.0, 1.0, 1.0], 1.0),
    0.25: ([0, 0, 0, 0, 0, 2, 5, 10], [0.67226, 0.68595, 0.85801], 1.0259),
    0.5: ([0, 0, 1, 1, 1, 5, 8, 10], [0.32384, 0.89502, 0.66559], 1.1643),
    1.0: ([0, 1, 1, 1, 1, 1, 5, 9], [0.20337, 0.93681, 0.74014], 1.5898),
    2.0: ([1, 1, 1, 1, 1, 1, 2, 8], [0.15970, 0.94963, 0.79096], 2.5493),
    4.0: ([1, 1, 1, 1, 1, 1, 1, 8], [0.14133, 0.95473, 0.81285], 4.5286),
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("strength", PLANTED)
def test_planted_intruder(strength, exact):
    counts, cosines, largest = PLANTED[strength]
    row = measure(DIAGONAL, spiked(strength), exact=exact)
    for side in ("cos_left", "cos_right"):
        assert [intruders(row[side], 10, e) for e in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)] == counts
        np.testing.assert_allclose([row[side][i] for i in (0, 1, 9)], cosines, atol=6e-6)
    assert row["sigma_after"][0] == pytest.approx(largest, abs=5e-5)


def test_the_update_finds_the_planted_intruder_in_a_large_matrix():
    n = 256
    W0 = torch.diag(torch.linspace(1, 0.1, n, dtype=torch.float64))
    v = torch.ones(n, dtype=torch.float64) / math.sqrt(n)
    fast, slow = (measure(W0, W0 + 3 * torch.outer(v, v), exact=e) for e in (False, True))
    assert fast["solver"] == "update" and slow["solver"] == "full"
    np.testing.assert_allclose(fast["cos_left"], slow["cos_left"], atol=1e-4)
    assert intruders(fast["cos_left"]) == 1 and fast["numerical_rank"] == 1


@pytest.mark.parametrize("factor", [3.0, -1.0, 1.5])
def test_scaling_is_no_intruder(factor):
    row = measure(DIAGONAL, factor * DIAGONAL)
    np.testing.assert_allclose(row["cos_left"] + row["cos_right"], 1, atol=1e-6)
    np.testing.assert_allclose(row["sigma_after"], abs(factor) * np.array(row["sigma_before"]), rtol=1e-6)
    assert row["norm_ratio"] == pytest.approx(abs(factor - 1)) and row["changed"]


def test_identity_and_an_amplified_base_vector():
    same = measure(DIAGONAL, DIAGONAL.clone())
    assert not same["changed"] and same["cos_left"] == [1.0] * 10 and same["numerical_rank"] == 0
    aligned = DIAGONAL.clone()
    aligned[-1, -1] += 4
    row = measure(DIAGONAL, aligned)
    np.testing.assert_allclose(row["cos_left"] + row["cos_right"], 1, atol=1e-6)
    assert row["index_left"][0] == N - 1 and row["overlap"] == pytest.approx(0.9)


@pytest.mark.parametrize(("m", "count", "cosine"), [(2, 0, math.sqrt(0.5)), (8, 8, 8**-0.5), (16, 10, 0.25)])
def test_a_rotation_is_told_by_the_window_and_by_the_right_side(m, count, cosine):
    R = torch.eye(N, dtype=torch.float64)
    R[:m, :m] = torch.from_numpy(scipy.linalg.hadamard(m) / math.sqrt(m))
    base, tuned = full(DIAGONAL), full(R @ DIAGONAL)
    tuned = Svd(tuned.U[:, :10], tuned.S[:10], tuned.V[:, :10])
    row = spectra.compare(base, tuned, window=max(m, 10))
    assert intruders(row["cos_left"]) == count and intruders(row["cos_right"]) == 0
    np.testing.assert_allclose(row["cos_left"], [cosine] * min(m, 10) + [1] * (10 - min(m, 10)), atol=1e-9)
    np.testing.assert_allclose(row["window_left"], 1, atol=1e-9)


@pytest.mark.parametrize("wide", [False, True])
def test_a_tall_matrix_is_left_through_its_column_space(wide):
    W0 = torch.zeros(64, 16, dtype=torch.float64)
    W0[:16] = torch.diag(torch.arange(16, 0, -1, dtype=torch.float64) / 16)
    W1 = W0.clone()
    W1[40] += 2 * torch.ones(16, dtype=torch.float64) / 4
    row = measure(W0.T, W1.T) if wide else measure(W0, W1)
    long, short = ("right", "left") if wide else ("left", "right")
    expected = [0.14024, 0.93646, 0.88499, 0.85188, 0.82600]
    np.testing.assert_allclose(row[f"cos_{long}"][:5], expected, atol=6e-6)
    assert row[f"cos_{short}"][0] == pytest.approx(0.29388, abs=6e-6)
    assert row[f"escape_{long}"] > 0.5 and row[f"escape_{short}"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "effective", "squared", "stable"),
    [
        ([3.0], 1, 1, 1),
        ([2.0] * 8, 8, 8, 8),
        ([4, 2, 1, 1], 3.36359, 2.27632, 1.375),
        (list(range(64, 0, -1)), 53.15763, 41.87793, 21.83594),
    ],
)
def test_ranks(values, effective, squared, stable):
    S = torch.tensor(values, dtype=torch.float64)
    assert effective_rank(S) == pytest.approx(effective, abs=5e-6)
    assert effective_rank(S**2) == pytest.approx(squared, abs=5e-6)
    assert stable_rank(S) == pytest.approx(stable, abs=5e-6)


def test_floor_of_random_vectors():
    for (d, n), mean in {(768, 768): 0.123, (3072, 768): 0.061, (1024, 1024): 0.109}.items():
        found, most = floor(d, n)
        assert found == pytest.approx(mean, abs=0.003) and found < most < 2 * found


def power_law(m, n, seed=0, power=0.7):
    g = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(torch.randn(m, n, generator=g), full_matrices=False)
    return (U * torch.arange(1, min(m, n) + 1) ** -power) @ Vh


CHANGES = {
    "rank 1": lambda g, m, n: torch.outer(torch.randn(m, generator=g), torch.randn(n, generator=g)),
    "rank 8": lambda g, m, n: torch.randn(m, 8, generator=g) @ torch.randn(8, n, generator=g),
    "rank 40": lambda g, m, n: torch.randn(m, 40, generator=g) @ torch.randn(40, n, generator=g),
    "dense": lambda g, m, n: torch.randn(m, n, generator=g),
}


@pytest.mark.parametrize("iterate", [True, False])
@pytest.mark.parametrize("shape", [(192, 192), (400, 150), (150, 400)])
@pytest.mark.parametrize("size", [0.05, 0.5, 1.5])
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("flat", [False, True])
def test_the_fast_path_is_the_full_one(tmp_path, monkeypatch, shape, size, kind, flat, iterate):
    monkeypatch.setattr(decompose, "ROUNDS", 12 if iterate else 0)
    g = torch.Generator().manual_seed(5)
    W0 = torch.randn(shape, generator=g) / math.sqrt(shape[1]) if flat else power_law(*shape)
    change = CHANGES[kind](g, *shape)
    W1 = W0 + change * (size * torch.linalg.matrix_norm(W0, 2) / torch.linalg.matrix_norm(change, 2))
    fast, slow = measure(W0, W1, folder=tmp_path), measure(W0, W1, exact=True)
    for side in ("left", "right"):
        np.testing.assert_allclose(fast[f"cos_{side}"], slow[f"cos_{side}"], atol=1e-4)
        for epsilon in spectra.EPSILONS:
            if not any(abs(c - epsilon) < 1e-4 for c in slow[f"cos_{side}"]):
                counts = [intruders(row[f"cos_{side}"], 10, epsilon) for row in (fast, slow)]
                assert counts[0] == counts[1]
    np.testing.assert_allclose(fast["sigma_after"], slow["sigma_after"], rtol=1e-6)
    for name in ("norm_ratio", "spectral_ratio", "effective_rank", "stable_rank", "amplification", "overlap"):
        assert fast[name] == pytest.approx(slow[name], rel=1e-3), name
    assert fast["grassmann_left"] == pytest.approx(slow["grassmann_left"], abs=1e-4)
    assert fast["numerical_rank"] == slow["numerical_rank"]
    assert fast["error"] <= decompose.TOLERANCE and fast["rank_error"] <= spectra.RANK_ERROR
    assert fast["effective_rank"] == pytest.approx(slow["effective_rank"], rel=fast["rank_error"] + 1e-5)
    if kind == "dense":
        assert fast["solver"] == ("krylov" if iterate else "gram")
    if kind.startswith("rank"):
        assert fast["numerical_rank"] == int(kind.split()[1])


def test_a_value_hidden_from_the_start_is_not_missed():
    """The change is dense, the start knows nothing of its largest direction, and that is just above the k-th value."""
    W0 = torch.diag(torch.linspace(2, 0.1, 200))
    W1 = W0.clone()
    W1[150, 150] = 5.0
    blind = torch.eye(200, 14)
    found = top(W1, 10, blind)
    np.testing.assert_allclose(found.S, torch.linalg.svdvals(W1)[:10], rtol=1e-6)
    old, new = (decompose.first(full(W), 10) for W in (W0, W1))
    assert Gram(W1).complete(new.S, new.V)
    assert not Gram(W1).complete(old.S, old.V), "the proof must be able to fail"


@pytest.mark.parametrize("rounds", [0, 12])
def test_degenerate_and_rank_deficient_matrices(monkeypatch, rounds):
    monkeypatch.setattr(decompose, "ROUNDS", rounds)
    twice = torch.diag(torch.cat([torch.full((12,), 2.0), torch.linspace(1, 0.1, 188)]))
    found = top(twice, 10)
    np.testing.assert_allclose(found.S, 2, rtol=1e-6)
    np.testing.assert_allclose(found.U[:12].norm(dim=0), 1, rtol=1e-6)
    poor = torch.zeros(200, 200)
    poor[:3, :3] = torch.eye(3)
    assert top(poor, 10).solver == "full" and top(poor, 10).S[3] < 1e-12


def test_bf16_is_computed_in_fp32_and_its_rounding_is_no_rank():
    W0 = power_law(256, 256).bfloat16()
    g = torch.Generator().manual_seed(1)
    change = torch.randn(256, 4, generator=g) @ torch.randn(4, 256, generator=g) / 256
    row = measure(W0, (W0.float() + change).bfloat16())
    assert row["dtype"] == "bfloat16" and row["numerical_rank"] == 4
    assert row["effective_rank"] < 4.001
    assert measure(W0, W0.float() + change)["numerical_rank"] == 4


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
        measure(torch.ones(3, 4), torch.ones(4, 3))
    with pytest.raises(ValueError, match="tuned matrix holds NaN"):
        measure(torch.ones(3, 3), torch.full((3, 3), math.nan))


def test_the_kept_decomposition_is_used_and_survives_a_cut_file(tmp_path, monkeypatch):
    W = power_law(100, 60)
    first = cached(W, tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    monkeypatch.setattr(decompose, "full", lambda W: pytest.fail("computed again"))
    again = cached(W.clone(), tmp_path)
    assert torch.equal(first.U, again.U) and torch.equal(first.S, again.S)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(cached(W, tmp_path).S, first.S)
    other = cached(W.double(), tmp_path), cached(W.reshape(60, 100), tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 and other[1].U.shape == (60, 60)
    assert not list(tmp_path.rglob(".part-*"))


def _decompose(folder):
    return float(cached(power_law(80, 80), folder).S.sum())


def test_many_processes_share_one_folder(tmp_path):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        sums = set(pool.map(_decompose, [tmp_path] * 8))
    assert len(sums) == 1 and len(list(tmp_path.rglob("*"))) == 2


def test_the_range_finder_refuses_a_dense_matrix():
    D = power_law(200, 100)
    assert low_rank(D, 1e-6) is None
    thin = D[:, :5] @ D[:5]
    found = low_rank(thin, 1e-6)
    np.testing.assert_allclose((found.U * found.S) @ found.V.T, thin.double(), atol=1e-6)
    assert guess(full(D), None, 5)[0].shape == (100, 5 + decompose.EXTRA)


@pytest.mark.parametrize(("count", "dense"), [(16, False), (17, True), (90, True)])
def test_a_part_of_a_matrix_proves_that_it_needs_more_values(count, dense):
    D = power_law(300, 240)[:, :count] @ power_law(240, 240)[:count]
    assert update._exceeds(D, 16, 1e-6 * float(D.norm())) == dense
    assert not update._exceeds(D, 96, 1e-6 * float(D.norm()))


@pytest.mark.parametrize("shape", [(200, 200), (160, 700), (900, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [0, 0.5, 2.0])
def test_eigenvalues_of_a_gram_matrix_are_as_exact_as_they_say(shape, dtype, power):
    W = (
        torch.randn(shape, generator=torch.Generator().manual_seed(2)) if power == 0 else power_law(*shape, power=power)
    ).to(dtype)
    W = W if shape[0] >= shape[1] else W.T
    gram, exact = Gram(W), full(W)
    squares, V = gram.eigen(10)
    assert float((squares - exact.S**2).abs().max()) < gram.error(squares)
    np.testing.assert_allclose(V.T @ V, np.eye(10), atol=300 * torch.finfo(dtype).eps)
    np.testing.assert_allclose(gram @ V, V * squares[:10], atol=4 * gram.error(squares))
    if power:
        np.testing.assert_allclose((V.double() * exact.V[:, :10]).sum(0).abs(), 1, atol=1e-4)


def _planned(m, n, S, seed=3):
    """An (m, n) change with the singular values S."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, len(S), generator=g, dtype=torch.float64))[0] for d in (m, n))
    return ((U * S) @ V.T).float()


@pytest.mark.parametrize(
    ("m", "n", "smallest", "single"),
    [(480, 160, 0.2, True), (480, 160, 1e-4, False), (160, 480, 0.2, True), (160, 160, 0.2, False)],
)
def test_the_spectrum_of_a_dense_change_is_taken_in_single_precision_where_that_is_enough(m, n, smallest, single):
    D = _planned(m, n, torch.logspace(0, math.log10(smallest), 160, dtype=torch.float64))
    found, exact = spectra._spectrum(D, None, 10, 1e-7), full(D)
    assert (found.error > 1e-8) == single and found.error < spectra.RANK_ERROR
    assert effective_rank(found.S) == pytest.approx(effective_rank(exact.S), rel=found.error + 1e-6)
    for ours, theirs in ((found.U, exact.U), (found.V, exact.V)):
        np.testing.assert_allclose((ours.double() * theirs[:, :10]).sum(0).abs(), 1, atol=1e-4)


@pytest.mark.parametrize("tail", [0.0, 1.2e-7, 3e-7, 4.77e-7, 1e-6])
def test_the_numerical_rank_of_a_dense_change_is_that_of_the_full_decomposition(tail):
    """150 values of a spectrum, the rest far below the rounding, near it, at it (decided by a full one) and above."""
    S = torch.cat([torch.logspace(0, -4, 150, dtype=torch.float64), torch.full((50,), tail, dtype=torch.float64)])
    D = _planned(300, 200, S)
    found, exact = spectra._spectrum(D, None, 10, 0.0), full(D)
    count = [int((x > spectra._noise(x, 0.0)).sum()) for x in (found.S, exact.S)]
    assert count[0] == count[1]
    if tail in (0.0, 1e-6):
        assert count[0] == (200 if tail else 150) and found.solver == "full"


def test_equal_values_under_a_low_rank_change_are_all_found():
    """Iteration from single vectors can miss copies; the count of larger values tells."""
    W0 = torch.diag(torch.cat([torch.full((12,), 2.0), torch.linspace(1, 0.1, 188)]))
    v = torch.ones(200) / math.sqrt(200)
    W1 = W0 + 0.7 * torch.outer(v, v)
    row = measure(W0, W1)
    np.testing.assert_allclose(row["sigma_after"], torch.linalg.svdvals(W1.double())[:10], rtol=1e-6)
    np.testing.assert_allclose(row["window_left"][1:8], 1, atol=0.2)
    change = low_rank(W1 - W0, 1e-5)
    S, A, B = (t.numpy() for t in update._coordinates(full(W0), change))
    values = np.linalg.svd(np.diag(S) + A @ B.T)[1] ** 2
    for limit in np.quantile(values, [0.01, 0.3, 0.6, 0.9, 0.97]) + 1e-4:
        assert update._larger(S, A, B, limit) == (values > limit).sum()


@pytest.mark.parametrize("shape", [(200, 200), (500, 160)])
def test_the_routines_of_a_gpu_say_the_same(shape):
    """Their branch, on a CPU: no symmetric routines, all in float64."""
    W, exact = power_law(*shape), full(power_law(*shape))
    gram, other = Gram(W.double()), object.__new__(Gram)
    other.cpu, other.dtype, other.values = False, torch.float64, W.double().T @ W.double()
    np.testing.assert_allclose(other @ exact.V, gram @ exact.V, atol=1e-12)
    for ours, theirs in zip(other.eigen(10), gram.eigen(10), strict=True):
        np.testing.assert_allclose(ours.abs(), theirs.abs(), atol=1e-10)
    for kept in (slice(0, 10), slice(1, 11)):
        complete = [g.complete(exact.S[kept], exact.V[:, kept]) for g in (gram, other)]
        assert complete == [kept.start == 0] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 256), (700, 192), (192, 700)])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_gpu_measures_what_a_cpu_does(shape, kind, tmp_path):
    W0 = power_law(*shape)
    change = CHANGES[kind](torch.Generator().manual_seed(5), *shape)
    W1 = W0 + change * (0.5 / torch.linalg.matrix_norm(change, 2))
    ours, theirs = (measure(W0.to(d), W1.to(d), folder=tmp_path) for d in ("cuda", "cpu"))
    for name in ("cos_left", "cos_right", "window_left", "sigma_after", "effective_rank", "grassmann_left", "overlap"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-3)
    assert ours["numerical_rank"] == theirs["numerical_rank"]
