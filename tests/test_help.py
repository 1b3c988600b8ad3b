"""`python -m analysis COMMAND --help`: every command shows how it is used, and none waits for torch."""

import sys

import pytest

from analysis.__main__ import _parser, main

COMMANDS = (
    "table", "report", "plot", "pareto", "compare", "recommend", "export",
    "spectra", "causal", "forgetting", "dynamics", "continual", "sizes", "findings",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_loads_no_torch(command, capsys, monkeypatch):
    for heavy in ("torch", "pandas", "matplotlib", "transformers"):
        monkeypatch.setitem(sys.modules, heavy, None)  # an import of it now fails
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and text.startswith(f"usage: python -m analysis {command}")
    assert f"  python -m analysis {command} " in text.partition("examples:")[2], "an example of this command"


def test_no_command_is_left_out():
    (commands,) = (action.choices for action in _parser()._actions if action.choices)
    assert sorted(commands) == sorted(COMMANDS)
