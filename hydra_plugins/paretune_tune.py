"""Hydra takes sweepers from this namespace alone; the code is in `bench/tune.py`."""

from bench.tune import Tuner


class Tune(Tuner):
    """`override /hydra/sweeper: tune`: the same number of trials for every cell."""
