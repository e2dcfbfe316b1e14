"""The experiments' programs: a results file is drawn and judged again as it says."""

import json
import shutil

import pytest

from experiments import cfsp, lapp, masksparsity, precropping

PROGRAMS = {"masksparsity": masksparsity, "lapp": lapp, "precropping": precropping, "cfsp": cfsp}
BESIDE = {
    "masksparsity": [],
    "lapp": ["seeds"],
    "precropping": ["step_ms"],
    "cfsp": [],
}  # what else their checks look at


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
