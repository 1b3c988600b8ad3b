"""The spectra of a whole model: one row per weight matrix of its blocks, and the numbers that stand for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.spectra import EPSILON, EPSILONS, K, floor, intruders, measure, ties
from analysis.weights import renamed

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

NO_CHANGE = "no weight change"
_NO_BLOCK = re.compile(r"embed|wte|wpe|lm_head|classifier|score|pooler|shared|head$", re.IGNORECASE)


def spectra(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    architecture: str | None = None,
    k: int = K,
    folder: Path | None = None,
    device: Any = "cpu",
) -> pd.DataFrame:
    """One row per matrix: `name`, `layer`, `kind`, then what `measure` gives.

    before, after: (out, in) matrices of the pretrained and the tuned model under the same names, as `bench.model.weights`
    makes them; read one at a time, so that mappings which load on demand never hold a model. architecture: `model_type` of
    its config; its blocks' matrices are taken and a fused query, key and value is split. Without a known one: every matrix
    but embeddings and heads. A matrix that two names share is measured once.

    Raises ValueError for matrices that only one side has, and where there is none.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for piece in pieces(before, after, architecture, device):
        try:
            rows.append(piece.where | measure(piece.before, piece.after, k, folder))
        except ValueError as error:
            raise ValueError(f"{piece.where['name']}: {error}") from error
    return pd.DataFrame(rows)


class Piece(NamedTuple):
    """A matrix of a block, or query, key or value of a fused one: `rows` of the matrix `name`, before and after (out, in)."""

    name: str
    rows: slice
    where: dict[str, Any]  # `name`, `layer` and `kind` for the table
    before: Tensor
    after: Tensor


def pieces(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], architecture: str | None, device: Any = None
) -> Iterator[Piece]:
    """The block matrices of two models one after the other, on `device` (None: that of the tuned one); as for `spectra`."""
    after = align(before, after)
    for name in _distinct(chosen(before, after, architecture), before, after):
        W1 = after[name].to(device)
        W1 = W1.cpu() if W1.device.type == "mps" else W1  # which has no float64
        W0 = before[name].to(W1.device)
        for label, role, rows in parts(name, W0, architecture):
            yield Piece(name, rows, {"name": label, "layer": _layer(name), "kind": role}, W0[rows], W1[rows])


def align(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`after` under the names of `before` where all differ by a wrapper's or a head's prefix alone."""
    if set(before) & set(after):
        return after
    for name in after:
        ends = [n for n in before if name.endswith(f".{n}") or n.endswith(f".{name}")]
        if len(ends) == 1:
            cut, add = name.removesuffix(ends[0]), ends[0].removesuffix(name)
            prefix, new = (cut, "") if name.endswith(ends[0]) else ("", add)
            names = {new + n.removeprefix(prefix): n for n in after if n.startswith(prefix)}
            return renamed(after, names)
    return after


def chosen(before: Mapping[str, Any], after: Mapping[str, Any], architecture: str | None) -> list[str]:
    """Names of the blocks' matrices, in the order of `before`."""
    sides = [[n for n in side if kind(n, architecture)] for side in (before, after)]
    if different := sorted(set(sides[0]) ^ set(sides[1])):
        where = "pretrained" if different[0] in sides[0] else "tuned"
        raise ValueError(
            f"{len(different)} matrices exist on one side only: {', '.join(different[:5])} ({different[0]} in the {where} "
            "model). Compare two checkpoints of the same architecture"
        )
    if not sides[0]:
        raise ValueError(
            f"no weight matrix of a block found (architecture {architecture!r}); there are {', '.join([*before][:5])}"
        )
    return sides[0]


def _distinct(names: list[str], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[str]:
    """Leave out matrices that lie in the same memory as an earlier one, before and after (tied weights)."""
    seen = set()
    for name in names:
        if isinstance(before, dict) and isinstance(after, dict):  # others load anew, where addresses mean nothing
            key = before[name].data_ptr(), after[name].data_ptr(), before[name].shape
            if key in seen:
                continue
            seen.add(key)
        yield name


def _roles(architecture: str | None) -> dict[str, str]:
    from methods.architectures import ARCHITECTURES

    return {k: v for k, v in ARCHITECTURES.get(architecture or "", {}).items() if k != "layers"}


def kind(name: str, architecture: str | None) -> str:
    """The role of a matrix ("query", "mlp_output"; "qkv" where fused), else its last name; "" where it is none of a block."""
    if not (roles := _roles(architecture)):
        return "" if _NO_BLOCK.search(name) else name.rpartition(".")[2]
    found = [role for role, pattern in roles.items() if re.search(pattern, name)]
    return "qkv" if len(found) == 3 else found[0] if found else ""


def parts(name: str, W: Tensor, architecture: str | None) -> Iterator[tuple[str, str, slice]]:
    """(name, kind, rows) of a matrix: itself, or query, key and value where these are one."""
    role = kind(name, architecture)
    if role != "qkv":
        yield name, role, slice(None)
        return
    third = len(W) // 3
    for i, part in enumerate(("query", "key", "value")):
        yield f"{name}.{part}", part, slice(i * third, (i + 1) * third)


def _layer(name: str) -> int:
    """The first number in a module's name; -1 without one."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else -1


def headline(table: pd.DataFrame, k: int = K, epsilon: float = EPSILON) -> dict[str, float | None]:
    """The numbers of a model: sums over its matrices as in the paper, means of the changes' ranks over changed matrices.

    None for all that a change would be needed for where no matrix changed: a method that changes no weight has no
    intruders and no absence of them. `share`: of the matrices with an intruder. `floor`: the largest mean similarity of a
    random vector. Compare sums between models with the same `matrices` and k only.
    """
    numbers: dict[str, float | None] = {"k": k, "epsilon": epsilon, "matrices": len(table)}
    changed = table[table["changed"]]
    numbers["changed"] = len(changed)
    counts = {"intruders": "cos_left", "intruders_right": "cos_right", "intruders_window": "window_left"}
    for name, column in counts.items():
        numbers[name] = _sum(table, column, k, epsilon)
    numbers["share"] = float((_counts(table, "cos_left", k, epsilon) > 0).mean()) if len(changed) else None
    numbers["ties"] = int(sum(ties(c, k, epsilon) for c in table["cos_left"])) if len(changed) else None
    numbers |= {f"intruders_at_{e:g}": _sum(table, "cos_left", k, e) for e in EPSILONS}
    for name in ("effective_rank", "stable_rank", "numerical_rank", "norm_ratio", "amplification", "overlap"):
        values = changed[name].dropna() if name in changed else changed.index.to_series()
        numbers[name] = float(values.mean()) if len(values) else None
    numbers["error"] = float(table["error"].max())
    numbers["floor"] = max(
        floor(out, min(out, inner))[0] for out, inner in set(zip(table["out"], table["in"], strict=True))
    )
    return numbers


def _counts(table: pd.DataFrame, column: str, k: int, epsilon: float) -> pd.Series:
    return table[column].map(lambda cosines: intruders(cosines, k, epsilon))


def _sum(table: pd.DataFrame, column: str, k: int, epsilon: float) -> int | None:
    return int(_counts(table, column, k, epsilon).sum()) if table["changed"].any() else None


def curve(
    table: pd.DataFrame, epsilons: Sequence[float] = EPSILONS, ks: Sequence[int] = (1, 2, 5, K), side: str = "left"
) -> pd.DataFrame:
    """Long table (`k`, `epsilon`, `intruders`) of the sums over all matrices; k beyond what was measured is left out."""
    import pandas as pd

    most = max(len(c) for c in table[f"cos_{side}"])
    cells = [(k, e, _sum(table, f"cos_{side}", k, e)) for k in ks if k <= most for e in epsilons]
    return pd.DataFrame(cells, columns=["k", "epsilon", "intruders"])


def participation(table: pd.DataFrame, by: Sequence[str] = ("layer", "kind")) -> pd.DataFrame:
    """Per layer and kind of matrix: intruders, and the share of the squared Frobenius norm of the whole change (`share`)."""
    one = table.assign(
        intruders=_counts(table, "cos_left", K, EPSILON), share=(table["norm_ratio"] * table["norm"]) ** 2
    )
    found = one.groupby(list(by), sort=True).agg(
        matrices=("name", "size"), intruders=("intruders", "sum"), share=("share", "sum")
    )
    total = found["share"].sum()
    return found.assign(share=found["share"] / total if total else float("nan")).reset_index()
