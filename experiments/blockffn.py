"""BlockFFN on a small decoder: few experts per token and per chunk of tokens, against TopK, ReMoE and a dense network.

    python -m experiments.blockffn

A decoder of two layers reads Python's standard library byte by byte for 300 steps, with equally many parameters in its
feed-forward layers each time. Measured on held-back files: the loss per byte, the share of experts that a token (TLS) and
8, 32 and 128 tokens in a row (CLS) leave out, how many of a token's experts the next one uses too, and experts that never
run. The trained BlockFFN then decodes held-back prompts speculatively, with n-grams as its drafter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments.expert_decoder import Decoders, Setting, kinds
from experiments.figures import label, panels, spread, table
from experiments.study import Demand, Key, Study, at_least, at_most

SPARSE = ("TopK", "ReMoE", "BlockFFN", "BlockFFN, chunks only", "BlockFFN, no losses")


def rows(s: Setting) -> dict[Key, Callable[[Decoders], Any]]:
    """Every kind of layer, then decoding."""
    out: dict[Key, Callable[[Decoders], Any]] = {
        ("trained", name): functools.partial(Decoders.row, name=name, experts=experts, losses=losses)
        for name, (experts, losses) in kinds(s).items()
    }
    return out | {("decoded",): functools.partial(Decoders.decoded, name="BlockFFN")}


def demands(stored: Mapping[str, Any]) -> dict[str, Demand]:
    """On means over the seeds; decoding on every seed."""
    r = {n: {k: v["mean"] for k, v in row.items()} for n, row in stored["results"]["trained"].items()}
    ours, gap = r["BlockFFN"], {n: r[n]["token_sparsity"] - r[n]["chunk_sparsity_8"] for n in SPARSE}
    experts = 2 * stored["setting"]["experts"]
    out = {f"CLS of 8 tokens at least 0.25 above {n}'s": at_least(ours["chunk_sparsity_8"], r[n]["chunk_sparsity_8"] + 0.25)
           for n in ("TopK", "ReMoE")}  # fmt: skip
    out |= {f"TLS - CLS of {n} at least 0.35": at_least(gap[n], 0.35) for n in ("TopK", "ReMoE")}
    decoded = [seed["decoded"] for seed in stored["seeds"].values()]
    return out | {
        "TLS at least 0.8": at_least(ours["token_sparsity"], 0.8),
        "TLS - CLS of BlockFFN at most 0.12": at_most(gap["BlockFFN"], 0.12),
        "loss at most 1.02 times TopK's": at_most(ours["loss"], 1.02 * r["TopK"]["loss"]),
        "TLS - CLS: without losses more than with chunks only":
            at_least(gap["BlockFFN, no losses"], gap["BlockFFN, chunks only"]),
        "TLS - CLS: with chunks only more than with both": at_least(gap["BlockFFN, chunks only"], gap["BlockFFN"]),
        "no static collapse: CLS of 128 at least 0.1 below that of 8":
            at_most(ours["chunk_sparsity_128"], ours["chunk_sparsity_8"] - 0.1),
        "at most half of the experts never run": at_most(ours["dead"], experts / 2),
        "speculative decoding equals decoding one by one, every prompt":
            at_least(min(d["equal"] / d["prompts"] for d in decoded), 1.0),
        "at least 1.3 tokens a pass": at_least(stored["results"]["decoded"]["tokens_per_pass"]["mean"], 1.3),
    }  # fmt: skip


def tables(stored: Mapping[str, Any]) -> list[Any]:
    """Loss and sparsity of every kind."""
    keys = ("loss", "token_sparsity", "chunk_sparsity_8", "chunk_sparsity_32", "chunk_sparsity_128", "reuse", "dead")
    lines = [[n, *(spread(r[k]) if k in r else "" for k in keys)] for n, r in stored["results"]["trained"].items()]
    d = stored["results"]["decoded"]
    more = [[spread(d[k]) for k in ("tokens_per_pass", "experts_of_a_token", "experts_of_a_pass")]]
    return [
        table("held-back text; mean and deviation over seeds", ("layer", "loss", "TLS", "CLS 8", "CLS 32", "CLS 128", "reuse",
              "dead"), lines),
        table("speculative decoding of BlockFFN", ("tokens a pass", "experts of a token", "experts of a pass"), more),
    ]  # fmt: skip


def draw(stored: Mapping[str, Any]) -> Any:
    """Share of experts in use over the number of tokens in a row."""
    figure, (axes,) = panels(1, (5.6, 4))
    for (name, r), color in zip(
        ((n, stored["results"]["trained"][n]) for n in SPARSE), ("#d1495b", "#edae49", "#2a6f97", "#61a5c2", "#b8c4d0")
    ):
        used = [r["token_sparsity"]["mean"], *(r[f"chunk_sparsity_{n}"]["mean"] for n in (8, 32, 128))]
        axes.plot([1, 8, 32, 128], [100 * (1 - u) for u in used], "o-", color=color, label=name)
    axes.set_xscale("log", base=2)
    label(axes, "tokens in a row", "experts that they use together, %", "")
    return figure


STUDY = Study("blockffn", __doc__, {"small": Setting()}, Decoders, rows, demands, tables, draw)

if __name__ == "__main__":
    STUDY.main()
