"""The decision of an interrupted run: read back as it was, or refused if it was cut short or changed."""

import json

import numpy as np
import pytest
from hostile import check, cut, damaged_json, flipped

from jprune.training.decisions import Decided, load_decision, save_decision

KEEP = {"a:1": np.arange(6) > 2, "b:0": np.eye(3, 5) > 0}
SHAPES = {g: k.shape for g, k in KEEP.items()}
NOTES = {"score": 0.5, "layers": [1, 2]}


def differs(found):
    keep = found.keep
    same = keep.keys() == KEEP.keys() and all((keep[g] == KEEP[g]).all() for g in KEEP)
    rest = (found.notes, found.ranks, found.warnings)
    return None if same and rest == (NOTES, (3, 4), ("beware",)) else "another decision"


def test_a_decision_comes_back_or_is_refused(tmp_path):
    folder = tmp_path / "decision"
    assert load_decision(folder, SHAPES) is None
    save_decision(folder, Decided(KEEP, NOTES, (3, 4), ("beware",)))
    assert differs(load_decision(folder, SHAPES)) is None
    notes, arrays = folder / "notes.json", folder / "keep.npz"
    assert check(notes, damaged_json(notes.read_text(), 3), lambda: load_decision(folder, SHAPES), differs) > 20
    data = arrays.read_bytes()
    assert check(arrays, [*cut(data), *flipped(data, 60)], lambda: load_decision(folder, SHAPES), differs) > 20
    with pytest.raises(ValueError, match="group 'b:0' of another model"):
        load_decision(folder, {**SHAPES, "b:0": (3, 4)})
    np.savez(arrays, **{"0": np.arange(6) > 1, "1": KEEP["b:0"]})  # a whole file that keeps one unit more
    with pytest.raises(ValueError, match=r"was changed since the run wrote it: remove .* to decide again"):
        load_decision(folder, SHAPES)
    save_decision(folder, Decided(KEEP, NOTES))
    said = json.loads(notes.read_text())
    notes.write_text(json.dumps({**said, "ranks": [8]}))
    with pytest.raises(ValueError, match="was changed"):
        load_decision(folder, SHAPES)
    arrays.unlink()
    with pytest.raises(ValueError, match=r"there is no file .*keep\.npz"):
        load_decision(folder, SHAPES)
