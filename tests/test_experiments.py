"""Every shipped experiment composes, says what it costs and how to start it; published recipes have their papers' values."""

import re

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from bench.config import CONF, compose
from bench.estimate import row_counts

FILES = sorted((CONF / "experiment").glob("*.yaml"))
PUBLISHED = sorted((CONF / "experiment" / "published").glob("*.yaml"))
NAMED = {
    "glue_roberta", "glue_deberta", "vtab_vit", "gsm8k_llama", "intruder_mnli", "rank_sweep", "alpha_rule", "low_data",
    "memory_ladder", "smoke", "demo", "tune_brief", "tune_glue", "tune_vtab",
}  # fmt: skip


def choices(file):
    """(key, values) of what a file sweeps."""
    params = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
    for override in OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()]):
        key = override.get_key_element()
        yield (
            key,
            list(override.sweep_string_iterator())
            if override.is_sweep_override()
            else [override.get_value_element_as_str()],
        )


def test_the_experiments_are_there():
    assert {f.stem for f in FILES} >= NAMED


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_value_that_an_experiment_sweeps_composes(file):
    grid = {key: values if key != "seed" else values[:1] for key, values in choices(file)}
    for i in range(max(map(len, grid.values()), default=0)):  # the i-th value of each at once
        config = compose([f"experiment={file.stem}", *(f"{k}={v[i % len(v)]}" for k, v in grid.items())])
        assert config.name and config.train.batch_size >= 1


@pytest.mark.parametrize("name", sorted(NAMED))
def test_an_experiment_begins_with_its_command_and_its_cost(name):
    directive, command, cost, *_ = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert directive == "# @package _global_"  # Hydra reads it on the first line alone
    assert command.startswith(f"# python -m bench experiment={name}")
    assert re.search(r"# \d+ runs.*(about [\d.]+ (hours on one A100|minutes on two CPU)|python -m bench.plan)", cost), (
        cost
    )


def test_the_intruder_grid_holds_alpha_times_lr():
    for file in (CONF / "experiment" / "intruder_mnli").glob("lora_*.yaml"):
        values = yaml.safe_load(file.read_text())
        assert values["method"]["alpha"] * values["train"]["lr"] == pytest.approx(2.4e-3)
        rank = int(re.search(r"_r(\d+)_", file.stem)[1])
        assert values["method"]["rank"] == rank and values["method"]["alpha"] == (2 * rank if "2r" in file.stem else 8)


def recipe(method, model, task):
    return compose([f"experiment=published/{method}_{model}_{task}", *(["task=" + task] if "vtab" in task else [])])


def test_adalora_has_the_values_of_its_table_8():
    table = {  # lr, batch size, epochs, gamma, t_i, Delta_T, t_f
        "mnli": (5e-4, 32, 7, 0.1, 8000, 100, 50000), "rte": (1.2e-3, 32, 50, 0.3, 600, 1, 1800),
        "qnli": (1.2e-3, 32, 5, 0.1, 2000, 100, 8000), "mrpc": (1e-3, 32, 30, 0.1, 600, 1, 1800),
        "qqp": (5e-4, 32, 5, 0.1, 8000, 100, 25000), "sst2": (8e-4, 32, 24, 0.1, 6000, 100, 22000),
        "cola": (5e-4, 32, 25, 0.5, 800, 10, 3500), "stsb": (2.2e-3, 32, 25, 0.1, 800, 10, 2000),
    }  # fmt: skip
    for task, (lr, batch, epochs, gamma, initial, interval, final) in table.items():
        config = recipe("adalora", "deberta_v3_base", task)
        method, train = config.method, config.train
        assert (train.lr, train.batch_size, train.epochs, method.orthogonal) == (lr, batch, epochs, gamma)
        steps = epochs * -(-config.task.sizes["train"] // batch)
        assert round(method.initial * steps) == pytest.approx(initial, abs=1) and method.interval == interval
        assert round(method.final * steps) == pytest.approx(final, abs=1)


def test_vera_and_ssf_have_their_tables_values():
    vera = {
        "sst2": (4e-3, 60),
        "mrpc": (1e-2, 30),
        "cola": (1e-2, 80),
        "qnli": (1e-2, 25),
        "rte": (4e-3, 160),
        "stsb": (1e-2, 80),
    }
    for task, values in vera.items():
        config = recipe("vera", "roberta_base", task)
        assert (config.train.lr, config.train.epochs) == values
        assert (config.method.rank, config.train.batch_size, config.task.max_length) == (1024, 64, 512)
    other = {
        "caltech101": 1e-3, "clevr_count": 2e-3, "clevr_distance": 5e-2, "dsprites_location": 1e-2, "kitti_distance": 1e-2,
        "svhn": 1e-2, "smallnorb_azimuth": 2e-2, "eurosat": 3e-3, "resisc45": 2e-3,
    }  # fmt: skip
    files = [f for f in PUBLISHED if f.stem.startswith("ssf_vit_b16_vtab_")]
    assert len(files) == 19
    for file in files:
        task = file.stem.removeprefix("ssf_vit_b16_")
        assert recipe("ssf", "vit_b16", task).train.lr == other.get(task.removeprefix("vtab_"), 5e-3)


def test_t5_warms_up_for_500_steps():
    for file in [f for f in PUBLISHED if "_t5_base_" in f.stem]:
        config = compose([f"experiment=published/{file.stem}"])
        steps = config.train.epochs * -(-row_counts(config.task)["train"] // config.train.batch_size)
        assert config.train.warmup * steps == pytest.approx(500, rel=0.01) and config.train.epochs == 20
