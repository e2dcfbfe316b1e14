"""The experiments' programs: a results file is drawn and judged again as it says; every row still runs."""

import json
import shutil

import pytest

from experiments import lapp, masksparsity, precropping

PROGRAMS = {"masksparsity": masksparsity, "lapp": lapp, "precropping": precropping}
BESIDE = {"masksparsity": [], "lapp": ["seeds"], "precropping": ["step_ms"]}  # what else their checks look at


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_committed_results_say_what_the_checks_say(name, tmp_path):
    program = PROGRAMS[name]
    file = program.RESULTS / f"{name}-small.json"
    stored = json.loads(file.read_text())
    more = [list(stored[k].values()) if k == "seeds" else stored[k] for k in BESIDE[name]]
    assert program.checks(stored["results"], *more) == stored["checks"]
    assert len(stored["seeds"]) >= 3
    copy = tmp_path / file.name
    shutil.copy(file, copy)
    program.main(config="small", out=copy, redraw=True)
    assert copy.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert copy.read_text() == file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs"), [("masksparsity", 1), ("lapp", 7), ("precropping", 1)])
def test_every_row_runs(name, epochs, tmp_path):
    out = tmp_path / f"{name}-small.json"
    PROGRAMS[name].main(config="small", seeds=(0,), out=out, epochs=epochs)
    found = json.loads(out.read_text())
    committed = json.loads((PROGRAMS[name].RESULTS / out.name).read_text())
    assert found["results"].keys() == committed["results"].keys()
    assert found["checks"].keys() == committed["checks"].keys()
