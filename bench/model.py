"""Build a pretrained model with its task's head, and the operations that are the same for every method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.imports import uncollected
from bench.parts import like, local, whole
from methods.base import Adapted, Added, Unsupported, trains

if TYPE_CHECKING:
    from bench.config import ModelConfig
    from tasks import Task

PACKAGED = Path(__file__).parent


class UnknownModel(Exception):
    """The checkpoint cannot be had here; the message names the ways out."""


@dataclass
class Built:
    """A frozen pretrained model with a trainable new head, and what turns rows into its inputs."""

    model: nn.Module
    processor: Any  # tokenizer or image processor
    head: tuple[str, ...]  # names of the head's parameters
    source: dict[str, Any]  # where the weights came from: goes into the record


def build(cfg: ModelConfig, task: Task) -> Built:
    """Load the checkpoint `cfg.path`, give it the head of `task`, freeze the rest.

    The head is drawn from torch's global generator: seed before the call. Paths: a hub id or folder;
    `embedded:NAME` (weights from the package registry); `packaged:NAME` (ours); `random:KIND` (tests only).
    """
    with uncollected():
        import transformers
        import transformers.modeling_utils

    transformers.logging.set_verbosity_error()  # what is new in the head is in the record, not on the screen
    transformers.utils.logging.disable_progress_bar()
    kind, _, name = cfg.path.partition(":")
    source: dict[str, Any] = {"kind": "random"}
    with of_a_kind(cfg, task):
        if kind == "random":
            from bench.random_models import random_pair

            model, processor = random_pair(name, task)
            missing = _names(model, task.head)
        else:
            folder, source = _locate(cfg, kind, name)
            processor = _processor(folder, cfg, task)
            model, missing = _pretrained(folder, cfg, task, processor)
            source |= _limits(model, processor, task)
    linear_conv1d(model)
    head = sorted(set(missing) & {n for n, _ in model.named_parameters()})
    freeze(model, tuple(head))
    source |= {"path": cfg.path, "revision": cfg.revision, "dtype": cfg.dtype, "head": head}
    return Built(model, processor, tuple(head), source)


@contextmanager
def of_a_kind(cfg: ModelConfig, task: Task) -> Iterator[None]:
    """Raise Unsupported inside where transformers has no such model with the task's head: T5 as a decoder, a ViT for text."""
    try:
        yield
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise Unsupported(
            f"{cfg.path} cannot have the head of a {task.kind} task: transformers has no {task.model_class} of it"
        ) from error


def freeze(model: nn.Module, head: tuple[str, ...]) -> None:
    """Train exactly the parameters whose names start with one of `head`."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(head) if head else False)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, head included, by name."""
    return {n: p for n, p in model.named_parameters() if trains(p)}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold to rebuild the model from the pretrained weights: the values of what is trained.

    Of what is shared out, in the machine's memory, and each rank must ask.
    """
    return {n: whole(p.detach()) for n, p in trained_parameters(model).items()}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a saved `trained_state` back. Raises ValueError naming the parameters that do not fit."""
    own = trained_parameters(model)
    if own.keys() != state.keys():
        raise ValueError(f"the saved state does not fit this model: {sorted(own.keys() ^ state.keys())[:5]} differ")
    for name, tensor in state.items():
        p, layer = own[name], model.get_submodule(name.rpartition(".")[0])
        if p.shape != tensor.shape and getattr(layer, "elastic", False):
            p.data = torch.empty(tensor.shape, dtype=p.dtype, device=p.device)
        local(p.detach()).copy_(local(like(tensor, p)))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The (out, in) weight each linear layer acts with, named as in the pretrained model; absent where there is none."""
    layers: dict[str, Any] = acting(model)
    found = {n: m.weight() if isinstance(m, Adapted) else m.weight for n, m in layers.items()}
    return {n: w.detach() for n, w in found.items() if w is not None and w.dim() == 2}


def acting(model: nn.Module) -> dict[str, nn.Module]:
    """Pretrained linear layers and what took their place, named as in the pretrained model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Adapted) or (isinstance(module, nn.Linear) and not _inside_ours(model, name))
    }


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold every change that is a change of weight or bias into its layer, which takes its old place again."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, Adapted)]:
        if (weight := module.weight()) is None:
            continue
        module.unpack()
        bias, layer = module.bias(), module.owner()
        layer.weight.copy_(weight)  # type: ignore[operator, union-attr]
        if bias is not None and bias is not layer.bias:
            layer.bias = nn.Parameter(bias.detach().to(layer.weight.dtype).clone(), requires_grad=False)  # type: ignore[arg-type]
        model.set_submodule(name, module.base)


def counts(model: nn.Module, head: set[int]) -> dict[str, int]:
    """Parameters of the method and of the head (`head`: ids of its parameters), apart; stored and total, with bytes."""
    trained = trained_parameters(model).values()
    return dict(
        trained_params=sum(p.numel() for p in trained if id(p) not in head),
        head_params=sum(p.numel() for p in trained if id(p) in head),
        stored_params=sum(p.numel() for p in trained),
        stored_bytes=sum(p.numel() * p.element_size() for p in trained),
        total_params=sum(
            getattr(p, "stands_for", p.numel()) for p in model.parameters()
        ),  # packed: what they stand for
    )


def linear_conv1d(model: nn.Module) -> None:
    """Replace GPT-2's Conv1D layers, which keep their weight as (in, out), by `nn.Linear` of the same function."""
    for name, module in [(n, m) for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]:
        inner, outer = module.weight.shape  # type: ignore[misc, union-attr]
        linear = nn.Linear(inner, outer, dtype=module.weight.dtype, device="meta")  # type: ignore[arg-type]
        linear.weight = nn.Parameter(module.weight.detach().T.contiguous())  # type: ignore[operator, union-attr]
        linear.bias = nn.Parameter(module.bias.detach())  # type: ignore[operator, union-attr]
        model.set_submodule(name, linear)


def _inside_ours(model: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(parents[: i + 1])), Adapted | Added) for i in range(len(parents))
    )


def _names(model: nn.Module, prefixes: tuple[str, ...]) -> list[str]:
    return [n for n, _ in model.named_parameters() if prefixes and n.startswith(prefixes)]


def _locate(cfg: ModelConfig, kind: str, name: str) -> tuple[str, dict[str, Any]]:
    if kind == "embedded":
        import json

        from bench.embedded import materialise

        folder = materialise(name)
        return str(folder), {"kind": "package"} | json.loads((folder / "source.json").read_text())
    if kind == "packaged":
        return str(PACKAGED / name), {"kind": "packaged"}
    return cfg.path, {"kind": "folder" if Path(cfg.path).is_dir() else "hub"}


def _processor(folder: str, cfg: ModelConfig, task: Task) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    if task.kind == "image":
        return _from_pretrained(AutoImageProcessor, folder, cfg, backend="pil")
    tokenizer = _from_pretrained(AutoTokenizer, folder, cfg)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if cfg.max_length:
        tokenizer.model_max_length = min(tokenizer.model_max_length, cfg.max_length)
    return tokenizer


def _limits(model: Any, processor: Any, task: Task) -> dict[str, Any]:
    """Bound the tokenizer by the model's positions; for the record: that bound, or how images are made into pixels."""
    if task.kind == "image":
        kept = ("size", "resample", "do_resize", "do_normalize", "image_mean", "image_std", "rescale_factor")
        return {"processor": {k: v for k, v in processor.to_dict().items() if k in kept}}
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and "roberta" in model.config.model_type:
        positions -= model.config.pad_token_id + 1  # its positions begin behind the padding's number
    if positions:
        processor.model_max_length = min(processor.model_max_length, positions)
    return {"max_length": min(processor.model_max_length, 10**9)}


def _pretrained(folder: str, cfg: ModelConfig, task: Task, processor: Any) -> tuple[nn.Module, list[str]]:
    import transformers

    config = _from_pretrained(transformers.AutoConfig, folder, cfg)
    if config.model_type == "sam2_hiera_det_model":
        from bench.hiera import HieraForImageClassification as auto  # not an Auto class of transformers
    else:
        auto = getattr(transformers, task.model_class)  # type: ignore[misc]
    options = task.options(config) | dict(dtype=getattr(torch, cfg.dtype), output_loading_info=True)
    if task.kind != "image":
        options["pad_token_id"] = processor.pad_token_id
    model, info = _from_pretrained(auto, folder, cfg, **options, attn_implementation=cfg.attention)
    return model, sorted(info["missing_keys"])


def _from_pretrained(auto: Any, folder: str, cfg: ModelConfig, **options: Any) -> Any:
    revision = {} if Path(folder).is_dir() else {"revision": cfg.revision}
    try:
        return auto.from_pretrained(folder, **revision, **options)
    except OSError as error:
        raise UnknownModel(
            f"the model {cfg.path!r} (revision {cfg.revision}) cannot be loaded: {str(error).splitlines()[0]} "
            "Ways out: a network that reaches the hub (and an account for gated models: `hf auth login`), "
            "model.path=FOLDER of a downloaded checkpoint, or an embedded model such as model=minilm"
        ) from error
