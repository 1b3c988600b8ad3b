"""A sweep as tasks of a Ray cluster that the launcher starts on this machine: pip install 'paretune[ray]', pytest -m slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.config import compose
from bench.record import Record
from bench.run import run

ROOT = Path(__file__).parents[1]
CELL = ["model=random_bert", "task=rte", "data=standin", "task.limit={train:48,val:12,test:12}", "wandb=off"]
CELL += ["train.steps=6", "train.batch_size=8", "train.eval_every=3", "task.max_length=48"]
pytestmark = pytest.mark.slow


def sweep(folder):
    """Two runs as tasks; more than once where Ray's node is not up within the 30 seconds that Ray gives it."""
    command = [sys.executable, "-m", "bench", "-m", "hydra/launcher=ray_tasks", *CELL, f"results={folder}"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 400}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(3):
        done = subprocess.run([*command, "method=lora,bitfit"], cwd=folder, env=environment, **options)
        if "timed out during startup" not in done.stdout:
            break
    return done


def test_tasks_of_ray_compute_what_this_process_computes(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    folder = tmp_path / "ray"
    folder.mkdir()
    done = sweep(folder)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("_run_job pid=") and "Started a local Ray instance" in done.stdout
    for method in ("lora", "bitfit"):
        alone = run(compose([*CELL, f"method={method}", f"results={tmp_path / 'alone'}"]))
        found = Record.load(folder / alone.id)
        assert (found.status, found.history, found.metrics) == ("ok", alone.history, alone.metrics)
