"""LoRAPrune: heads and MLP channels pruned by adapters' gradients against true gradients, magnitudes and chance.

    python -m experiments.loraprune                          # Python's library as text, three seeds, CPU

Half of the heads and MLP channels of layers 1 to 4 of six are pruned, in 60 steps of LoRA training; all rows of a seed see
the same batches. The published recipe, for a decoder in a folder, is experiments.loraprune_folder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments.adapted_decoder import AdaptedDecoder, Setting, memory
from experiments.figures import OTHERS, OURS, bars, label, mean, panels, spread, table
from experiments.record import over_seeds
from experiments.study import Demand, Key, Run, Study, at_most
from jprune.training.progress import display

PROGRAMS = ("accumulating", "whole step")


def rows(s: Setting) -> dict[Key, Callable[[AdaptedDecoder], Any]]:
    """The dense model, the loop with other options, and pruning at once."""
    change = functools.partial(dataclasses.replace, s.options)
    loops = {c: change(criterion=c) for c in ("lora", "grad", "magnitude", "random")}
    loops["lora, cooldown 0.5"] = change(cooldown=0.5)
    return {
        ("dense",): lambda one: one.dense,
        **{(name,): functools.partial(AdaptedDecoder.row, name=name, options=o) for name, o in loops.items()},
        ("one-shot grad",): lambda one: one.one_shot[0],
        ("one-shot grad, untuned",): lambda one: one.one_shot[1],
    }


def agreement(s: Setting) -> dict[str, Any]:
    """Rank correlation of each criterion's scores with the change of the loss when a unit is zeroed."""
    with display() as progress:
        return over_seeds([AdaptedDecoder(s, Run(seed, None, progress)).agreement() for seed in s.agreement])


def held(s: Setting) -> dict[str, Any]:
    """Bytes of a step, layers unrolled and scanned."""
    return {form: memory(s, form == "scanned") for form in ("unrolled", "scanned")}


def pruned(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The results but for the dense model's, the best first."""
    found = {name: r for name, r in stored["results"].items() if name != "dense"}
    return dict(sorted(found.items(), key=lambda item: item[1]["excess"]["mean"]))


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over the seeds."""
    excess = {name: r["excess"]["mean"] for name, r in pruned(stored).items()}
    lora, steps = stored["results"]["lora"], stored["memory"]
    bytes_ = {form: m["accumulating"]["lora"] / m["accumulating"]["grad"] for form, m in steps.items()}
    return {
        "excess of lora at most 0.92 times that of magnitude": at_most(excess["lora"], 0.92 * excess["magnitude"]),
        "excess of lora at most 0.65 times that of random": at_most(excess["lora"], 0.65 * excess["random"]),
        "excess of lora at most 1.10 times that of grad": at_most(excess["lora"], 1.10 * excess["grad"]),
        **{f"memory of the accumulating micro-step at most 0.75 times that of grad ({form})": at_most(share, 0.75)
           for form, share in bytes_.items()},
        "no gradient has the shape of a weight": at_most(max(m["gradients of weights"]["lora"] for m in steps.values()), 0),
        "the sliced model is the masked one":
            at_most(abs(lora["sliced_perplexity"]["mean"] / lora["perplexity"]["mean"] - 1), 1e-3),
    }  # fmt: skip


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Every row, agreement with ablation, and memory."""
    lines = [[name, spread(r["perplexity"]), spread(r["excess"]), mean(r["parameters_removed"], ".1%"), mean(r["seconds"], ".0f")]
             for name, r in pruned(stored).items()]  # fmt: skip
    title = f"held-out perplexity per byte, mean and deviation over seeds; dense {spread(stored['results']['dense'])}"
    said = ", ".join(f"{c} {mean(v, '.2f')}" for c, v in stored["agreement"].items())
    columns = ("row", "perplexity", "excess over dense", "parameters removed", "seconds")
    return [
        table(title, columns, lines),
        f"rank correlation of scores with the loss's change when a unit is zeroed: {said}",
        *(f"{form}, {name}: {m[name]['lora'] / 1e6:.1f} MB lora, {m[name]['grad'] / 1e6:.1f} MB grad"
          for form, m in stored["memory"].items() for name in PROGRAMS),
    ]  # fmt: skip


def draw(stored: Mapping[str, Any]) -> Any:
    """Left: excess of every row. Right: bytes of a step with adapters' gradients and with those of the weights."""
    figure, (left, right) = panels(2, (11, 3.8), width_ratios=(1.2, 1))
    bars(left, pruned(stored), "excess", "perplexity over that of the dense model, minus 1", ours=["lora"], fontsize=8)
    programs = [(form, name) for form in stored["memory"] for name in PROGRAMS]
    for j, (criterion, color) in enumerate((("lora", OURS), ("grad", OTHERS))):
        heights = [stored["memory"][form][name][criterion] / 1e6 for form, name in programs]
        right.bar([k + 0.38 * j - 0.19 for k in range(len(programs))], heights, 0.34, color=color, label=criterion)
    names = [f"{form}\n{name.replace('accumulating', 'micro-step')}" for form, name in programs]
    right.set_xticks(range(len(programs)), names, fontsize=8)
    label(right, "", "MB")
    return figure


STUDY = Study("loraprune", __doc__, {"small": Setting()}, AdaptedDecoder, rows, demands, tables, draw,
              once={"agreement": agreement, "memory": held})  # fmt: skip

if __name__ == "__main__":
    STUDY.main()
