"""The notebooks run from top to bottom on synthetic records."""

from pathlib import Path

import pytest

from tests.test_analysis import synthetic, write_grid

jupytext = pytest.importorskip("jupytext", reason="needs the notebook extra: pip install -e '.[notebook]'")
nbclient = pytest.importorskip("nbclient", reason="needs the notebook extra: pip install -e '.[notebook]'")
NOTEBOOKS = sorted((Path(__file__).parent.parent / "analysis" / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    results = write_grid(tmp_path / "results", seeds=2)
    synthetic("vera", status="failed", score=None, reason="out of luck").save(results)
    monkeypatch.setenv("PARETUNE_RESULTS", str(results))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = jupytext.read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2  # one front per task
    assert any("out of luck" in o["data"].get("text/plain", "") for o in outputs if "data" in o)
