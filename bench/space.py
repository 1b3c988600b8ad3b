"""What tuning searches for a method: its learning rate and the field that its file declares; and points of that space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]  # of one trial: {"train.lr": 3e-4, "method.scale": 0.1}
DECADES = 10.0  # the learning rate is searched from a tenth to this many times the paper's, where the file says nothing


@dataclass(frozen=True)
class Dimension:
    """One value that is searched: among `choices`, or between `low` and `high`, evenly in the logarithm where `log`."""

    key: str
    default: Any
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for a range that is none, or a default outside of what is searched."""
        if self.choices:
            inside = self.default in self.choices
        else:
            inside = self.low <= self.default <= self.high and self.low < self.high and (self.low > 0 or not self.log)
        if not inside:
            options = list(self.choices) or f"{self.low} to {self.high}{', logarithmic' * self.log}"
            raise ValueError(f"{self.key}={self.default!r} cannot be searched in {options}")

    def at(self, u: float) -> Any:
        """The value at `u` in [0, 1) of the way; four digits of it."""
        if self.choices:
            return self.choices[int(u * len(self.choices))]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        x = low + u * (high - low)
        value = math.exp(x) if self.log else x
        return round(value) if isinstance(self.default, int) else float(f"{value:.4g}")


def space(method: Any, extra: dict[str, Any] | None = None, fixed: Sequence[str] = ()) -> list[Dimension]:
    """The dimensions of a method (an instance): `train.lr`, then its fields made by `searched`, then `extra`, the same for all.

    extra: key to {default, choices} or {default, range, log}. `fixed` keys, and fields that are not as their file has them,
    are not searched: a user has set them.
    """
    low, high = method.lr_range or (method.lr / DECADES, method.lr * DECADES)
    found = [Dimension("train.lr", method.lr, low=low, high=high)]
    for f in dataclasses.fields(method):
        if "range" in f.metadata and getattr(method, f.name) == f.default:
            found.append(_dimension(f"method.{f.name}", {"default": f.default, **f.metadata}))
    found += [_dimension(key, spec) for key, spec in (extra or {}).items()]
    return [d for d in found if d.key not in fixed]


def _dimension(key: str, spec: dict[str, Any]) -> Dimension:
    if choices := tuple(spec.get("choices") or ()):
        return Dimension(key, spec["default"], choices)
    low, high = spec["range"]
    return Dimension(key, spec["default"], low=low, high=high, log=spec.get("log", True))


def points(dimensions: Sequence[Dimension], trials: int, sampler: str, seed: int) -> list[Values]:
    """`trials` points, the paper's own values first: the same for the same seed, and a longer list begins as a shorter one.

    Points of the unit cube depend on seed and number of dimensions alone, so that every method is asked at the same ones.
    sampler: sobol (scrambled) or random.
    """
    import numpy as np
    from scipy.stats import qmc

    first = {d.key: d.default for d in dimensions}
    if sampler == "random":
        rows = np.random.default_rng(seed).random((trials - 1, len(dimensions)))
    else:
        engine = qmc.Sobol(len(dimensions), rng=np.random.default_rng(seed))
        rows = engine.random_base2(max(0, math.ceil(math.log2(max(1, trials - 1)))))[: trials - 1]
    return [first, *({d.key: d.at(u) for d, u in zip(dimensions, row, strict=True)} for row in rows)]


class Proposals:
    """Asks for one trial after the other and is told what came of it: a fixed list of points, or Optuna's TPE."""

    def __init__(self, dimensions: Sequence[Dimension], trials: int, sampler: str, seed: int):
        self.study: Any = None
        if sampler == "optuna":
            self.study = _study(dimensions, seed)
            self.distributions = _distributions(dimensions)
        else:
            self.points: Iterator[Values] = iter(points(dimensions, trials, sampler, seed))

    def ask(self) -> Values:
        """The values of the next trial."""
        if self.study is None:
            return next(self.points)
        self.asked = self.study.ask(self.distributions)
        return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in self.asked.params.items()}

    def tell(self, val: float | None) -> None:
        """The val score of the trial that was asked for last; None where it failed."""
        if self.study is not None:
            from optuna.trial import TrialState

            state = TrialState.FAIL if val is None else TrialState.COMPLETE
            self.study.tell(self.asked, val, state)


def _study(dimensions: Sequence[Dimension], seed: int) -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError("hydra.sweeper.sampler=optuna: install it with pip install 'paretune[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial({d.key: d.default for d in dimensions})
    return study


def _distributions(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def of(d: Dimension) -> Any:
        if d.choices:
            return CategoricalDistribution(d.choices)
        if isinstance(d.default, int):
            return IntDistribution(int(d.low), int(d.high), log=d.log)
        return FloatDistribution(d.low, d.high, log=d.log)

    return {d.key: of(d) for d in dimensions}
