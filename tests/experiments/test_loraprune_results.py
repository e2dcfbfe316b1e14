"""LoRAPrune's program: its results file is drawn and judged again as it says."""

import json
import shutil

from experiments import loraprune


def test_the_committed_results_say_what_the_checks_say(tmp_path):
    file = loraprune.RESULTS / "loraprune-small.json"
    stored = json.loads(file.read_text())
    assert loraprune.checks(stored["results"], stored["memory"]) == stored["checks"] and len(stored["seeds"]) >= 3
    per_seed = [{k: v for k, v in seed.items() if k != "dense"} for seed in stored["seeds"].values()]
    assert loraprune.summary(per_seed) == stored["results"]
    copy = tmp_path / file.name
    shutil.copy(file, copy)
    loraprune.main(config="small", out=copy, redraw=True)
    assert copy.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert copy.read_text() == file.read_text()
