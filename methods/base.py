"""What a PEFT method is: a dataclass whose fields are its hyper-parameters, and one function, `apply`.

Counting, saving, merging and spectra are generic over `Adapted` and live in `bench`; a method file holds only what its
paper says. The smallest complete method is `bitfit.py`, the usual low-rank one `lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from hydra.core.config_store import ConfigStore
from torch import Tensor, nn

from methods.architectures import role

Batch = dict[str, Tensor]
METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")
Hook = TypeVar("Hook", bound=Callable[..., Any])


class Unsupported(Exception):
    """This method cannot act on this model or task: the run is recorded as `skipped`, with this sentence."""


@dataclass
class Method:
    """The protocol. Only `apply` is required."""

    lr: ClassVar[float] = 1e-3  # learning rate of the paper's recipe, taken where `train.lr` is null
    lr_range: ClassVar[tuple[float, float] | None] = None  # that tuning searches; null: a tenth to ten times `lr`
    family: ClassVar[str] = (
        ""  # for the table of methods, as the three below: reference, selective, low-rank, adapter, ...
    )
    acts: ClassVar[str] = ""  # where it acts: "weights of query and value"
    formula: ClassVar[str] = ""  # trained parameters without the head: "r (m + n) per layer"
    oracle: ClassVar[str] = "closed form"  # the independent implementation that the tests compare with
    mergeable: ClassVar[bool] = False  # its change can be folded into the pretrained weights
    neutral: ClassVar[bool] = True  # starts as exactly the pretrained model; False is a declared exception
    untrained: ClassVar[bool] = False  # True: nothing is trained, a run goes straight to scoring
    backward: ClassVar[bool] = True  # False: its optimizer asks for losses alone, so that no gradient is ever computed
    parallel: ClassVar[bool] = True  # False: it keeps of single rows what cannot be added up over several devices
    shardable: ClassVar[bool] = False  # True: AdamW alone looks at what it trains, so that shard=true shares that out

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        """Return the model to train, with `requires_grad` on exactly what is trained.

        `model` arrives frozen but for a new task head. `batches` yields training batches without end, for methods
        whose initial values depend on data. Raises `Unsupported` with a sentence where the method has no meaning.
        """
        raise NotImplementedError

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """A torch optimizer whose `step(closure)` may call the closure as often as it likes, with or without grad.

        It holds what rests too, which it cannot move while that has no gradient.
        """
        trained = [p for p in model.parameters() if trains(p)]
        adam = torch.optim.AdamW(trained, lr, weight_decay=weight_decay, fused=fused(trained))
        self.follow(model, adam)
        return adam

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Told of the optimizer that will train the model, whoever brings it: for what draws layers or drops state."""

    def penalty(self, model: nn.Module) -> Tensor | float:
        """A term added to the task loss."""
        return 0.0

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Called after optimizer step `step` (from 0) of `steps`, with that step's gradients still there."""

    def finish(self, model: nn.Module) -> None:
        """Called once after training: averaging, dropping what was pruned."""

    @property
    def finishes(self) -> bool:
        """Whether `finish` does something, so that the model must be scored again after it."""
        return type(self).finish is not Method.finish

    def numbers(self, model: nn.Module) -> dict[str, float]:
        """What the history logs beside the loss where a method changes what it trains: ranks, sparsity, budgets."""
        return {}

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint keeps beside trained parameters and optimizer: plain values and tensors, nested."""
        return {}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Put `state` back into a freshly applied model, before its trained parameters are loaded."""


@dataclass
class Part(Method):
    """A method that acts on what another trains: an optimizer, a schedule of layers, an allocation of ranks.

    In `compose` the others say what is trained. Alone it comes with the method that its paper trains (`alone`).
    """

    def alone(self) -> Method:
        """The method that `apply` takes where no other says what is trained; by default full fine-tuning."""
        from methods.full_ft import FullFT

        return FullFT()

    def attach(self, model: nn.Module) -> None:
        """Prepare a model on which another method was applied: draw the first layers, say what comes later."""

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        model = self.alone().apply(model, batches)
        self.attach(model)
        return model


def register(cls: M) -> M:
    """Make `method=<file name>` select this dataclass, typed and closed."""
    name = cls.__module__.rpartition(".")[2]
    METHODS[name] = cls
    ConfigStore.instance().store(group="method", name=name, node=cls)
    return cls


def searched(
    default: Any, choices: Sequence[Any] = (), *, low: float | None = None, high: float | None = None, log: bool = True
) -> Any:
    """A field with this default that tuning searches beside the learning rate: among `choices`, or from `low` to `high`.

    At most one per method, so that no method has more to choose from than another; where the paper searched, its values.
    """
    return field(default=default, metadata={"choices": tuple(choices), "range": (low, high), "log": log})


def trains(p: nn.Parameter) -> bool:
    """Whether `p` belongs to what is trained: it has gradients now, or rests until its method wakes it again."""
    return p.requires_grad or getattr(p, "resting", False)


def fused(parameters: Iterable[nn.Parameter]) -> bool | None:
    """AdamW's `fused`: one kernel where torch has one for the devices of all `parameters`, else torch's choice."""
    return all(p.device.type in ("cpu", "cuda") for p in parameters) or None


def rest(parameters: Iterable[nn.Parameter], resting: bool = True) -> None:
    """Freeze trained parameters for a while, or wake them: no gradient meanwhile, and yet part of every checkpoint."""
    for p in parameters:
        p.resting = resting  # type: ignore[attr-defined]
        p.requires_grad_(not resting)


class Adapted(nn.Module):
    """A frozen layer `base` and a trainable change to it, in the place of that layer.

    `base` is an `nn.Linear` wherever `weight` is a change of weight (GPT-2's Conv1D layers become `nn.Linear` when
    the model is built), or a norm or convolution, which is merged but is no part of spectra; methods that only act on
    activations may hold any layer.
    """

    elastic: ClassVar[bool] = False  # training decides how many ranks it has: on loading, it takes the checkpoint's

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def weight(self) -> Tensor | None:
        """The (out, in) weight that the layer now acts with; None where the change is no change of weight."""
        return None

    def bias(self) -> Tensor | None:
        """The (out,) bias that the layer now acts with."""
        return getattr(self.base, "bias", None)

    def owner(self) -> nn.Module:
        """The layer that `weight` and `bias` belong to, where it lies inside `base` (the patch embedding of a ViT)."""
        return self.base

    def unpack(self) -> None:
        """Before a merge: let `base` hold its weight as a plain tensor, where it holds a quantised one."""

    def __getattr__(self, name: str) -> Any:
        """Shape and dtype questions (`in_features`, `weight.dtype` is not one of them) go to the frozen layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("in_features", "out_features"):
                return getattr(super().__getattr__("base"), name)
            raise


class Added(nn.Module):
    """A network beside the pretrained one: none of its layers is a pretrained layer, to be merged or compared with it."""


def new_parameter(base: nn.Module, *shape: int) -> nn.Parameter:
    """A trained parameter of zeros beside the frozen layer `base`: on its device, in float32 where `base` is in half.

    Half precision cannot hold the small steps of an optimizer. A forward therefore takes its input to the parameter's
    dtype and its result back to that of the layer's output.
    """
    return nn.Parameter(torch.zeros(shape, **placement(base)))


def placement(base: nn.Module) -> dict[str, Any]:
    """`device` and `dtype` of what is trained beside `base`; the rule of `new_parameter`."""
    like = next(base.parameters())
    return {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}


def reads(hook: Hook) -> Hook:
    """Mark a hook of a frozen block, which reads what the block is given or returns and changes no value of it.

    The block remains one whose outputs may be kept instead of computed again: see `bench/prefix.py`.
    """
    hook.reads = True  # type: ignore[attr-defined]
    return hook


def adapt_linears(model: nn.Module, targets: str, adapt: Callable[[nn.Linear], Adapted]) -> list[str]:
    """Put `adapt(layer)` in the place of each linear layer that `targets` names; return their names.

    `targets` is a role that every architecture has (`query_value`, `attention`, `mlp`, `all_linear`, ...; see
    `methods/architectures.py`) or a regular expression over the full names of modules. Heads are never adapted.
    Raises `Unsupported` with the names that exist where nothing matches.
    """
    pattern = re.compile(role(model, targets))
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen = [n for n in linears if pattern.search(n) and not next(model.get_submodule(n).parameters()).requires_grad]
    if not chosen:
        kinds = ", ".join(sorted({n.rpartition(".")[2] for n in linears}))
        raise Unsupported(f"no linear layer matches targets={targets!r}; this model's are called {kinds}")
    for name in chosen:
        model.set_submodule(name, adapt(model.get_submodule(name)))  # type: ignore[arg-type]
    return chosen
