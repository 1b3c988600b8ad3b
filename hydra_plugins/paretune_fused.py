"""Hydra takes launchers from this namespace alone; the code is in `bench/fused_launcher.py`."""

from bench.fused_launcher import FusedLauncher


class Fused(FusedLauncher):
    """`hydra/launcher=fused`: runs over one frozen backbone at once."""
