"""The weight matrices of a model before and after, read or computed one at a time, so that no second model lies in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bench.config import Config, ModelConfig
    from bench.model import Built


class Lazy(Mapping):
    """Matrices by name, each of which `get` brings when it is asked for."""

    def __init__(self, names: Iterable[str], get: Callable[[str], Tensor]):
        self.names, self.get_one = dict.fromkeys(names), get

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.get_one(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def renamed(inner: Mapping[str, Tensor], names: Mapping[str, str]) -> Lazy:
    """Some of `inner`; names: of each matrix here, to its name there."""
    return Lazy(names, lambda name: inner[names[name]])


def effective(model: nn.Module) -> Lazy:
    """What `bench.model.weights` gives, but a merged matrix lives only as long as its reader keeps it."""
    import torch

    from bench.model import acting

    layers: dict[str, Any] = acting(model)

    @torch.no_grad()
    def get(name: str) -> Any:
        weight = layers[name].weight
        weight = weight() if callable(weight) else weight
        return weight if weight is None else weight.detach()

    return Lazy([n for n in layers if (w := get(n)) is not None and w.dim() == 2], get)


def pretrained(config: Config, like: Mapping[str, Tensor], architecture: str | None) -> Mapping[str, Tensor]:
    """The weights that a run started from, in the dtype that it used, under the names of `like`.

    From the checkpoint's files where these hold every block matrix of `like`; else the model is built anew and kept, as for
    `random:` models, and for files whose names transformers changes while loading.
    """
    import torch

    from analysis.spectra_model import align, kind

    dtype = torch.bfloat16 if config.train.precision == "bf16_full" else getattr(torch, config.model.dtype)
    wanted = [n for n in like if kind(n, architecture)]
    stored = _files(config.model)
    found = {} if stored is None else align(like, stored)
    if wanted and set(wanted) <= set(found):
        order = [n for n in like if n in found] + [n for n in found if n not in like]
        return Lazy(order, lambda name: found[name].to(dtype))
    whole = effective(built(config).model)
    return Lazy(whole, lambda name: whole[name].to(dtype))


def built(config: Config, task: Any = None) -> Built:
    """The untouched model of a run, or its checkpoint with another task's head; no random state moves."""
    from bench.checkpoint import random_state, set_random_state
    from bench.model import build
    from bench.prepare import seed_everything

    state = random_state()
    seed_everything(config.seed)  # the weights of `random:` models are drawn
    try:
        return build(config.model, task or config.task)
    finally:
        set_random_state(state)


def _files(model: ModelConfig) -> Mapping[str, Tensor] | None:
    from analysis.checkpoints import open_checkpoint
    from bench.model import PACKAGED

    kind, _, name = model.path.partition(":")
    if kind == "random":
        return None
    try:
        return open_checkpoint(str(PACKAGED / name) if kind == "packaged" else model.path, model.revision)
    except FileNotFoundError:
        return None
