"""When not to look for cyclic garbage: in heavy imports, a tenth of whose time it takes, and at the end of the process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic garbage is looked for inside the block; for imports alone, which make none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def collect() -> None:
    """Look for garbage again, after `gc.disable()`, but never more in what lives now: modules and configurations."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def at_the_end() -> None:
    """Of what lives when a command ends nothing is looked through once more, which takes most of a second; it all goes."""
    gc.freeze()
    gc.disable()
