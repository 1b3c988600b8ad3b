"""Weight matrices of a stored checkpoint, read one at a time: a folder, a .safetensors file, a hub id, a `peft` adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CONV1D = re.compile(r"(^|\.)h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)$")
HEADS = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}
HEADS |= {"SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "TOKEN_CLS": "AutoModelForTokenClassification"}
HEADS |= {"QUESTION_ANS": "AutoModelForQuestionAnswering", "FEATURE_EXTRACTION": "AutoModel"}


class Checkpoint(Mapping):
    """The 2-D weights of safetensors files, (out, in), by the name of their module; each is read when asked for.

    architecture: `model_type` of the config beside them, None where there is none.
    """

    def __init__(self, files: list[Path], architecture: str | None = None):
        from safetensors import safe_open

        self.architecture = architecture
        self.place: dict[str, Path] = {}
        shapes: dict[str, list[int]] = {}
        for path in files:
            with safe_open(str(path), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    shape = file.get_slice(key).get_shape()
                    if key.endswith(".weight") and len(shape) == 2:
                        name = key.removesuffix(".weight")
                        self.place[name], shapes[name] = path, shape
        inner = [s for n, s in shapes.items() if n.endswith("mlp.c_fc")]
        self.turned = bool(inner) and all(s[0] < s[1] for s in inner)  # GPT-2's Conv1D keeps (in, out)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(str(self.place[name]), framework="pt") as file:
            W = file.get_tensor(f"{name}.weight")
        return W.T if self.turned and CONV1D.search(name) else W

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """A full model: a .safetensors file, a folder with some, `embedded:NAME`, or a hub id.

    Raises FileNotFoundError with the ways out.
    """
    path = Path(source)
    if path.is_file():
        return Checkpoint([path], _architecture(path.parent))
    folder = path if path.is_dir() else _download(source, revision)
    files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .safetensors file. Pickled weights (.bin) are not read: load the model once and "
            "save_pretrained() it, which writes safetensors"
        )
    return Checkpoint(files, _architecture(folder))


def open_tuned(source: str, base: str) -> tuple[Mapping[str, Tensor], str | None]:
    """The tuned side and its architecture: as `open_checkpoint`, or a folder of a `peft` adapter merged into `base`."""
    path = Path(source)
    folder = path if path.exists() else _download(source)
    if (folder / "adapter_config.json").exists():
        return merged(folder, base)
    found = open_checkpoint(source)
    return found, found.architecture


def merged(adapter: Path, base: str) -> tuple[dict[str, Tensor], str]:
    """Effective weights of `base` with the adapter folder `adapter`, by `peft`'s own merge, in float32.

    Merging in half precision would add rounding of full rank, which the spectrum would show.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("an adapter folder needs the peft package: pip install paretune[hf]") from error
    import torch
    import transformers

    from bench.model import linear_conv1d, weights

    config = json.loads((adapter / "adapter_config.json").read_text())
    auto = getattr(transformers, HEADS.get(config.get("task_type") or "", "AutoModel"))
    place = base if Path(base).is_dir() else str(_download(base))
    model = auto.from_pretrained(place, dtype=torch.float32, **_labels(adapter))
    tuned: Any = peft.PeftModel.from_pretrained(model, str(adapter))
    mergeable = hasattr(tuned.base_model, "merge_and_unload")  # prompts are not
    model = tuned.merge_and_unload() if mergeable else tuned.get_base_model()
    linear_conv1d(model)
    return weights(model), model.config.model_type


def _labels(adapter: Path) -> dict[str, int]:
    """How many classes the adapter's own head has, where it brings one."""
    from safetensors import safe_open

    with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as file:
        heads = [k for k in file.keys() if re.search(r"(classifier|score)(\.out_proj)?\.weight$", k)]  # noqa: SIM118
        return {"num_labels": file.get_slice(heads[0]).get_shape()[0]} if heads else {}


def _architecture(folder: Path) -> str | None:
    path = folder / "config.json"
    return json.loads(path.read_text()).get("model_type") if path.exists() else None


def _download(source: str, revision: str | None = None) -> Path:
    if source.startswith("embedded:"):
        from bench.embedded import materialise

        return materialise(source.removeprefix("embedded:"))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub raises many kinds
        raise FileNotFoundError(
            f"{source!r} is no file or folder here, and the hub cannot give it ({type(error).__name__}). "
            "Give a local folder or .safetensors file, or embedded:NAME (python -m bench.embedded --list)"
        ) from error
