"""Single weights of a vision transformer trained here: iCBS against one-shot methods, unstructured and 2:4.

    python -m experiments.sparse_transformer

The transformer of `experiments.digit_canvas` (six blocks, 32 wide) reads a digit somewhere on a noisy canvas. All its
kernels but the last are pruned, to densities of 0.5, 0.3 and 0.2; 800 canvases of training digits to calibrate on and for the
batches of iCBS, a thousand of held-back digits to measure on. Nothing is trained after pruning. A step of iCBS solves a block of
every kernel with one gradient (the paper solves one of one kernel).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import digit_canvas
from experiments.figures import bars, label, panels, spread, table
from experiments.sparse_network import Network
from experiments.study import Demand, Key, Run, Study, at_least

ONE_SHOT = ("magnitude", "Wanda", "SparseGPT", "CAP")
OURS = ("iCBS, 8 steps of all", "iCBS, 40 steps of all")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Densities that are asked for, and canvases to calibrate on."""

    densities: tuple[float, ...] = (0.5, 0.3, 0.2)
    calibration: int = 800


def begin(s: Setting, run: Run) -> Network:
    """The trained transformer of one seed."""
    module, variables = digit_canvas.trained(run.seed, progress=run.progress)
    seen, held = digit_canvas.calibration_set(run.seed, s.calibration), digit_canvas.test_set(run.seed)
    train, test = ((jnp.asarray(c.images), jnp.asarray(c.labels)) for c in (seen, held))
    return Network(module.apply, variables, train, test, run.seed)


def rows(s: Setting) -> dict[Key, Callable[[Network], Any]]:
    """Every method at every density; 2:4 without iCBS, whose moves would break the groups."""
    out: dict[Key, Callable[[Network], Any]] = {("dense",): lambda one: one.numbers(one.variables)}
    for d in s.densities:
        for name in (*ONE_SHOT, *OURS):
            out[f"{d:g}", name] = functools.partial(Network.row, name=name, density=d)
    for name in ONE_SHOT:
        out["2:4", name] = functools.partial(Network.row, name=name, density=None, pattern="2:4")
    return out


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over the seeds, in points of accuracy."""
    out = {}
    for d, r in stored["results"].items():
        if d not in ("dense", "2:4"):
            acc = {n: x["accuracy"]["mean"] for n, x in r.items()}
            for name in ("magnitude", "Wanda"):
                out[f"{d}: iCBS not below {name} at the same density"] = at_least(acc[OURS[-1]], acc[name])
    return out


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Accuracy on the held-back canvases."""
    found = {d: r for d, r in stored["results"].items() if d != "dense"}
    names = dict.fromkeys(n for r in found.values() for n in r)
    lines = [[n, *(spread(r[n]["accuracy"]) if n in r else "" for r in found.values())] for n in names]
    dense = spread(stored["results"]["dense"]["accuracy"])
    return [table(f"accuracy in %, mean and deviation over seeds; dense {dense}", ("method", *found), lines)]


def draw(stored: Mapping[str, Any]) -> Any:
    """Accuracy of every method, a panel per density."""
    found = {d: r for d, r in stored["results"].items() if d != "dense"}
    figure, axes = panels(len(found), (4 * len(found), 3.6))
    for ax, (d, r) in zip(np.atleast_1d(axes), found.items()):
        bars(ax, r, "accuracy", "", ours=[n for n in r if n.startswith("iCBS")])
        label(ax, "accuracy on held-back canvases, %", "", d if ":" in d else f"{d} of the weights stay")
    return figure


STUDY = Study("sparse_transformer", __doc__, {"small": Setting()}, begin, rows, demands, tables, draw)

if __name__ == "__main__":
    STUDY.main()
