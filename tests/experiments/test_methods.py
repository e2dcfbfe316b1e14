"""The experiments' programs: a results file is drawn and judged again as it says."""

import json
import shutil

import pytest

from experiments import adaspa, cfsp

PROGRAMS = {"cfsp": cfsp, "adaspa": adaspa}
BESIDE = {
    "cfsp": [],
    "adaspa": ["seeds"],
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


def test_what_the_page_says_of_a_large_video_is_what_the_program_says(tmp_path):
    file = adaspa.RESULTS / "adaspa-hunyuan.json"
    adaspa.main(config="hunyuan", out=tmp_path / file.name)
    assert (tmp_path / file.name).read_text() == file.read_text()
    at = json.loads(file.read_text())["results"]["0.8"]
    assert (round(at["flops"] / 1e15), round(at["dense_flops"] / 1e15)) == (195, 523)
    assert round(at["speed_up_of_attention"], 1) == 2.7
