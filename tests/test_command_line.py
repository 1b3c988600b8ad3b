"""The command line as a user meets it: help, misspelled keys and choices, light imports."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.config import CONF, compose
from methods import METHODS

ROOT = Path(__file__).parents[1]


def bench(*arguments):
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_shows_groups_and_examples():
    done = bench("--help")
    assert done.returncode == 0
    for text in (
        "python -m bench method=lora task=rte",
        "linear_probe",
        "smollm2_135m",
        "gsm8k",
        "experiment: alpha_rule, demo,",
    ):
        assert text in done.stdout


def test_help_names_every_method_without_importing_torch():
    command = [sys.executable, "-X", "importtime", "-m", "bench", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    shown = next(line for line in done.stdout.splitlines() if line.startswith("method: "))
    variants = [file.stem for file in (CONF / "method").glob("*.yaml")]
    assert shown.removeprefix("method: ").split(", ") == sorted([*METHODS, *variants])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported and not imported & {"torch", "numpy", "pandas", "transformers"}


def test_the_configuration_needs_no_heavy_package():
    code = (
        "import sys, bench.config, bench.__main__, analysis; "
        "print([m for m in ('transformers', 'datasets', 'evaluate', 'peft', 'wandb', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("method=lroa", "method=lora"),
        ("task=gsm8", "task=gsm8k"),
        ("model=minlm", "model=minilm"),
        ("method.rnak=4", "method.rank"),
        ("sed=1", "seed"),
        ("train.batchsize=4", "train.batch_size"),
        ("+method.rnk=4", "rank"),
    ],
)
def test_misspellings_say_what_was_meant(argument, meant):
    done = bench(argument)
    assert done.returncode == 1
    assert meant in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "wrong", ["train.schedule=linaer", "train.precision=fp8", "wandb=yes", "train.batch_size=0", "data.mode=fake"]
)
def test_wrong_values_show_the_options(wrong):
    value = wrong.partition("=")[2]
    with pytest.raises(Exception, match=value):
        compose(["task=rte", wrong])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_composes(method):
    config = compose([f"method={method}"])
    assert type(config.method) is METHODS[method]


@pytest.mark.parametrize("file", sorted((ROOT / "conf").glob("method/*.yaml")), ids=lambda p: p.stem)
def test_every_variant_composes(file):
    assert compose([f"method={file.stem}"]).choices["method"] == file.stem


def test_auto_takes_the_model_of_the_task_and_keeps_what_was_set():
    assert compose(["task=rte"]).model.path == "embedded:minilm"
    config = compose(["task=gsm8k", "model.dtype=bfloat16"])
    assert (config.choices["model"], config.model.dtype) == ("smollm2_135m", "bfloat16")
    assert compose(["task=gsm8k", "model=random_llama"]).model.path == "random:llama"


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (
            ["method=compose", "method.parts={dora: {rank: 4}, lora_plus: {}}"],
            "parts",
            {"dora": {"rank": 4}, "lora_plus": {}},
        ),
        (["method=hf", "method.type=LOHA", "method.config={r: 4, alpha: 8}"], "config", {"r": 4, "alpha": 8}),
    ],
)
def test_free_values_are_set_whole_from_the_command_line(arguments, field, value):
    assert getattr(compose(arguments).method, field) == value
