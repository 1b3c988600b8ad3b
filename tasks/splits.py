"""Which public rows are train, val and test: val selects, test is read once, and they never share a row.

Every draw is fixed: an order by SHA-256 that depends on no seed of a run, no library and no platform.
`leakfree` is the rule of RED (arXiv 2402.15179), as ReFT, RoAd and DeLoRA use it; `vtab1k` that of arXiv 1910.04867.
"""

from __future__ import annotations

import hashlib
from itertools import accumulate
from typing import Any

SPLITS = ("train", "val", "test")
PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))
RULE = "sha256('0:<id>')"
PROTOCOLS = {
    "official": "the public splits as they are, all with labels",
    "leakfree": "val and test cut from one public split: 1,000 rows and the rest above 2,000 rows, else two halves",
    "devset": "val and test are both the whole public development set: comparable with old papers, selected on test",
    "heldout": "val is `holdout` rows of the public training split, test the public test split",
    "threeway": "val and test are `holdout` rows each of the one public split that all three are cut from",
    "fewshot": "train and val are each `shots` rows per class of the public training split, test its development set",
    "vtab1k": "train: the first 800 rows, val: the first 200 of the last tenth of public train; test: public test",
}
VTAB_ORDER = "the first of all and the first of the last tenth, in the copy's order: not the published lists of images"
STRIDE = 10_000_000  # ids of one public split lie below those of the next
BIG, BIG_VAL = 2000, 1000


def cut(protocol: str, splits: dict[str, str], sizes: dict[str, int], holdout: int) -> tuple[dict[str, list[int]], str]:
    """Indices into the public splits for train, val and test, in ascending order, and a sentence for the record.

    Under `fewshot` train and val are both the whole training split: `draw` then takes few rows of it for each. Raises ValueError where the public splits are missing, too small, or not named as the protocol needs.
    """
    for ours, theirs in splits.items():
        if theirs not in sizes:
            raise ValueError(f"task.splits.{ours}={theirs!r} does not exist; the public splits are {list(sizes)}")
    train, val, test = (splits[s] for s in SPLITS)
    same = {"official": (), "leakfree": (val, test), "devset": (val, test)}.get(protocol, (train, val))
    publics = {"official": 3, "threeway": 1}.get(protocol, 2)
    if (same and same[0] != same[1]) or len({train, val, test}) != publics:
        raise ValueError(f"task.protocol={protocol}: {PROTOCOLS[protocol]}; task.splits={dict(splits)} does not fit")
    chosen = {s: list(range(sizes[splits[s]])) for s in SPLITS}
    if protocol == "leakfree":
        chosen["val"], chosen["test"] = _parts(sizes[val], BIG_VAL if sizes[val] > BIG else (sizes[val] + 1) // 2)
    elif protocol == "heldout":
        chosen["val"], chosen["train"] = _parts(sizes[train], _fits(holdout, sizes[train]))
    elif protocol == "threeway":
        held, chosen["train"] = _parts(sizes[train], _fits(2 * holdout, sizes[train]))
        halves = shuffled(len(held))
        chosen["val"], chosen["test"] = (sorted(held[k] for k in half) for half in (halves[::2], halves[1::2]))
    elif protocol == "vtab1k":
        start = min(sizes[train] * 9 // 10, sizes[train] - _fits(200, sizes[train]))
        chosen["train"], chosen["val"] = list(range(min(800, start))), list(range(start, start + 200))
    return chosen, _sentence(protocol, splits, sizes, chosen)


def shuffled(n: int, seed: int = 0) -> list[int]:
    """0..n-1 in the order of the SHA-256 of `seed:index`."""
    return sorted(range(n), key=lambda i: _key(i, seed))


def subset(ids: list[int], size: int | None, rows: list[int] | None = None) -> list[int]:
    """Positions of `size` ids, ascending: the first in the order of the ids' hashes, so that smaller nests in larger.

    With `rows`, how many rows each id stands for: as many ids as have `size` rows at most, but one at least.
    """
    rows = rows or [1] * len(ids)
    if size is None or size >= sum(rows):
        return list(range(len(ids)))
    order = sorted(range(len(ids)), key=lambda k: _key(ids[k], 0))
    fit = sum(total <= size for total in accumulate(rows[k] for k in order))
    return sorted(order[: max(1, fit)])


def draw(classes: list[Any], shots: int, seed: int) -> tuple[list[int], list[int]]:
    """Positions of `shots` rows per class and of as many others, each ascending, in an order that `seed` shuffles.

    As LM-BFF draws its training and development rows (Gao et al. 2021, arXiv 2012.15723). Raises ValueError for a class
    with fewer than `shots` rows; the second draw is empty where a class has fewer than twice as many.
    """
    of: dict[Any, list[int]] = {}
    for i in shuffled(len(classes), seed):
        of.setdefault(classes[i], []).append(i)
    if scarce := {c: len(rows) for c, rows in of.items() if len(rows) < shots}:
        raise ValueError(f"task.shots={shots}, but these classes have fewer training rows: {scarce}")
    first = sorted(i for rows in of.values() for i in rows[:shots])
    enough = all(len(rows) >= 2 * shots for rows in of.values())
    return first, sorted(i for rows in of.values() for i in rows[shots : 2 * shots]) if enough else []


def together(units: list[Any]) -> list[list[int]]:
    """Positions with the same value of `units`, in the order in which values come first."""
    of: dict[Any, list[int]] = {}
    for i, unit in enumerate(units):
        of.setdefault(unit, []).append(i)
    return list(of.values())


def offsets(splits: dict[str, str]) -> dict[str, int]:
    """What is added to an index of each public split, so that ids are unique: 0 for the one that val is from."""
    return {name: k * STRIDE for k, name in enumerate(dict.fromkeys(splits[s] for s in ("val", "test", "train")))}


def _key(i: int, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{i}".encode()).digest()


def _parts(n: int, first: int) -> tuple[list[int], list[int]]:
    order = shuffled(n)
    return sorted(order[:first]), sorted(order[first:])


def _fits(rows: int, n: int) -> int:
    if not 0 < rows < n:
        raise ValueError(f"cannot hold out {rows} of {n} training rows; set task.holdout lower")
    return rows


def _sentence(protocol: str, splits: dict[str, str], sizes: dict[str, int], chosen: dict[str, list[int]]) -> str:
    parts = [f"{s}: {len(chosen[s])} of {sizes[splits[s]]} public {splits[s]} rows" for s in SPLITS]
    drawn = dict.fromkeys(("leakfree", "heldout", "threeway"), f"; drawn in the order of {RULE}")
    said = drawn | {"devset": "; val and test are the same rows", "vtab1k": f"; {VTAB_ORDER}"}
    return f"{protocol}: {', '.join(parts)}{said.get(protocol, '')}"
