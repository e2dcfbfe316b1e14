"""Every notebook runs: valid JSON of the format, without outputs, its code cells executed in order."""

import contextlib
import io
import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "colab"


def cells(text):
    """The sources of the code cells; fails where the file is not a clean notebook of format 4."""
    book = json.loads(text)
    assert (book["nbformat"], book["metadata"]["kernelspec"]["name"]) == (4, "python3")
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids) > 0
    out = []
    for cell in book["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and set(cell) >= {"id", "metadata", "source"}
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            out.append("".join(cell["source"]))
    return out


def run(sources):
    """(names, printed) after all cells, in one namespace."""
    names, printed = {"__name__": "notebook"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(sources):
            exec(compile(source, f"code cell {number}", "exec"), names)
    return names, printed.getvalue()


@pytest.mark.slow
def test_prune_llama(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names, printed = run(cells((NOTEBOOKS / "prune_llama.ipynb").read_text()))
    assert names["same"] == {"hetero": True, "padded": True, "uniform": True}
    assert float(names["difference"]) < 1e-4
    widths = names["pruned"].config.ffn
    assert len(set(widths)) > 1 and 0.4 < sum(widths) / (160 * 3) < 0.6
    assert names["report"].removed["ffn_channels"] == pytest.approx(1 - sum(widths) / 480)
    assert len(names["answer"]) == 24 and "the same bits" in printed


def test_every_notebook_is_run_here():
    assert sorted(f.name for f in NOTEBOOKS.glob("*.ipynb")) == ["prune_llama.ipynb"]


def test_an_unclean_notebook_is_noticed():
    book = json.loads((NOTEBOOKS / "prune_llama.ipynb").read_text())
    book["cells"][1]["outputs"] = [{"output_type": "stream"}]
    with pytest.raises(AssertionError):
        cells(json.dumps(book))
    with pytest.raises(ZeroDivisionError):
        run(["x = 0", "1 / x"])
