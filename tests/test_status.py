"""python -m bench.status: what it reads out of a results folder."""

import os
from pathlib import Path

from bench.ledger import Claim
from bench.record import Record
from bench.status import duration, main, read

MULTIRUN = """hydra:
  sweeper: {_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper, params: {task: "rte,stsb", seed: "0,1"}}
  overrides: {task: ["method=lora,ia3,bitfit", "seed=range(3)"]}
"""


def folder_with_a_sweep(tmp_path) -> float:
    """18 cells by two commands: 2 ok, 1 oom, 1 interrupted, 1 refused; one of an older single run. When they began."""
    for number, name in enumerate(("first", "second")):
        (tmp_path / ".hydra" / name).mkdir(parents=True)
        file = tmp_path / ".hydra" / name / "multirun.yaml"
        file.write_text(MULTIRUN)
        os.utime(file, (1000.0 + 100 * number,) * 2)
    words = {
        "0": "a",
        "1": "b",
        "2": "c",
        "3": "d",
        "4": "error: no such thing",
        "5": "running: x/e",
        "6": "stopped: SIGTERM",
    }
    for job, word in words.items():
        for name in ("first", "second"):  # the second command meets what the first did
            (tmp_path / ".hydra" / name / job).mkdir()
            (tmp_path / ".hydra" / name / job / "record").write_text(f"{tmp_path}/{word}" if len(word) == 1 else word)
    for id, status in {"a": "ok", "b": "ok", "c": "oom", "d": "interrupted", "z": "ok"}.items():
        path = Record(id, "lora", "m", "t", 0, {}, status=status).save(tmp_path)
        os.utime(path, (1000.0 + 60 * (ord(id) - ord("a") + 1),) * 2)
    return 1000.0


def test_a_sweep_of_two_commands_is_counted_once(tmp_path):
    began = folder_with_a_sweep(tmp_path)
    with Claim(tmp_path, "e", lease=60, cell="lora m t seed 1", began=began), Claim(tmp_path, "y", lease=60):
        (sweep, single), owners = read(tmp_path)
    assert sweep.cells == 2 * 3 * 3  # seed is given twice: the command line wins
    assert sweep.statuses == {"ok": 2, "oom": 1, "interrupted": 1, "failed": 1}
    assert (sweep.running, single.running) == (1, 1)
    assert sweep.left == 18 - 3 - 1 - 1  # the interrupted one is still to do, the refused one is not
    assert sweep.rate == 3 / 180  # a, b and c in three minutes
    assert sweep.eta == (13 + 1) * 60
    assert single.statuses["ok"] == 1
    assert owners["e"]["cell"] == "lora m t seed 1"


def test_the_command_shows_it(tmp_path, capsys):
    folder_with_a_sweep(tmp_path)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "method=lora,ia3,bitfit" in shown and "14 min" in shown and "single runs" in shown
    assert main([str(Path(tmp_path) / "nothing")]) == 2
    assert [duration(s) for s in (5, 600, 7200, 4e5)] == ["5 s", "10 min", "2.0 h", "4.6 d"]
