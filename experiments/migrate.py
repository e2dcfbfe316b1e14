"""Brings results files of the separate programs into the form of experiments.study: no number of a seed is changed.

    python -m experiments.migrate

Commands and settings get the names of today; results and verdicts are computed from the seeds again and must contain
what stood there. To be deleted when it has been applied.
"""

from __future__ import annotations

import json
from typing import Any

from experiments import adaspa, cfsp, divprune, grouping, lapp, loraprune, masksparsity, precropping, token_pruning
from experiments.record import write
from experiments.study import RESULTS, Study

STUDIES: dict[str, Study[Any, Any]] = {
    "grouping": grouping.STUDY,
    "divprune-digits": divprune.STUDY,
    "masksparsity-small": masksparsity.STUDY,
    "adaspa-small": adaspa.STUDY,
    "loraprune-small": loraprune.STUDY,
    "cfsp-small": cfsp.STUDY,
    "token-pruning-small": token_pruning.STUDY,
    "lapp-small": lapp.STUDY,
    "precropping-small": precropping.STUDY,
}
RENAMED = {"masksparsity": {"ratios": "sparsities"}, "lapp": {"rows": "compared"}, "loraprune": {"rows": "batch"}}


def contained(old: Any, new: Any) -> bool:
    """Whether every number of one nested dict stands in the other one too."""
    if isinstance(old, dict):
        return all(k in new and contained(x, new[k]) for k, x in old.items())
    return old == new


def migrated(study: Study[Any, Any], stem: str, old: dict[str, Any]) -> dict[str, Any]:
    """The file in today's form."""
    config = next(iter(study.settings))
    setting = {
        RENAMED.get(study.name, {}).get(k, k): v
        for k, v in old["setting"].items()
        if k not in ("model", "data", "config")
    }
    command = f"python -m experiments.{study.name} --config {config} --seeds {' '.join(old['seeds'])}"
    old = {k: x for k, x in old.items() if k != "dense_perplexity"}  # of the results by now
    if study.name == "cfsp" and "model" not in old["seeds"]["0"]:
        about = {s: {"perplexity": x["dense"], **{k: y for k, y in x.items() if k not in ("dense", "results")}}
                 for s, x in old["seeds"].items()}  # fmt: skip
        old["seeds"] = {s: {"model": about[s], **x["results"]} for s, x in old["seeds"].items()}
        setting.pop("tuned_at")
    new = study.summed({**old, "command": command, "setting": {"config": config, **setting}}, judge=True)
    assert contained(old["results"], new["results"]), stem
    assert list(old["checks"].values()) == list(new["checks"].values()), stem
    return new


if __name__ == "__main__":
    for stem, study in STUDIES.items():
        if (file := RESULTS / f"{stem}.json").is_file():
            new = migrated(study, stem, json.loads(file.read_text()))
            write(study.file(next(iter(study.settings))), new)
            if file != study.file(next(iter(study.settings))):
                file.unlink()
