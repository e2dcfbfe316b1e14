"""Token reducers on a vision transformer trained here: where digits lie, what is lost before and between its blocks.

    python -m experiments.token_pruning                       # three models, a thousand canvases each
    python -m experiments.token_pruning --redraw              # only the figure and the tables, from the results file

Nothing is trained after tokens are dropped. What is asked for is that scores find the digit, that dropping by them before the
first block beats dropping by chance, and that Zero-TPrune's stages in the network lose little; which score is best is
reported and not asked for, since small models spread an image over all their tokens within two blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.stats import rankdata

from experiments import record
from experiments.digit_canvas import Canvases, Recipe, calibration_set, model, sizes, test_set, trained
from jprune.methods.tokens.before_first_block import AtEntry, two_pass
from jprune.methods.tokens.cost import count_flops
from jprune.methods.tokens.pagerank import aggregate_heads, initial_signal, wpr_scores
from jprune.methods.tokens.reducers_by_name import reducer_for
from jprune.methods.tokens.schedules import ats_for, tome_for, topk_for
from jprune.methods.tokens.search import search_schedule
from jprune.methods.tokens.selection import best_places
from jprune.methods.tokens.topk import TopK
from jprune.methods.tokens.zero_tprune import PAPER_VARIANCES, PruneSpec, ZeroTPrune
from jprune.models.token_hook import Seen, TokenReducer, Tokens, take

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
BATCH = 250
SHARE = 0.4  # of what a layer drops, by similarity


# of `jprune.methods.tokens.reducers_by_name`, those that work between blocks
COLORS = {"zero_tprune": "#c1121f", "zero_tprune_uni": "#e07a5f", "tome": "#2a6f97", "ats": "#61a5c2", "evit": "#588157",
          "cls_topk": "#a3b18a", "column_mean": "#9d4edd", "random": "#8d99a6"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """Model, numbers of tokens and budgets."""

    recipe: Recipe = Recipe()
    kept: tuple[int, ...] = (32, 20, 12, 8)
    schedules: tuple[tuple[int, ...], ...] = ((44, 32, 24, 16), (24, 12, 8, 6))
    fractions: tuple[float, ...] = (0.9, 0.75, 0.6, 0.45, 0.3)
    searched: tuple[float, ...] = (0.3,)
    trials: int = 60
    few: int = 256
    images: int | None = None


@dataclasses.dataclass(frozen=True)
class WrongWay(TokenReducer):
    """Keeps the patches that average most over what they look at, A s: PageRank with the transpose forgotten. A control."""

    keep: int
    iters: int = 5

    def reads_weights(self, layer: int) -> bool:
        return layer == 0

    def after(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        if layer:
            return tokens
        assert seen.weights is not None
        n = tokens.x.shape[1]
        s = jnp.broadcast_to(1 + 0.01 * jnp.arange(n) / n, seen.weights.shape[:3])  # a uniform start would stay so
        for _ in range(self.iters):
            s = jnp.einsum("bhij,bhj->bhi", seen.weights, s)
        return take(tokens, best_places(aggregate_heads(s), self.keep, seen.prefix))


@functools.cache
def program(reducer: TokenReducer, twice: bool = False) -> Callable[..., Any]:
    """(variables, images, key) -> answers; one compilation for the models of all seeds."""
    module = model()

    def run(variables: Any, x: Any, key: Any) -> Any:
        def apply(x: Any, **options: Any) -> Any:
            return module.apply(variables, x, key=key, **options)

        return two_pass(apply, x, reducer) if twice else apply(x, reducer=reducer)

    return jax.jit(run)


def logits(reducer: TokenReducer, variables: Any, canvases: Canvases, seed: int, twice: bool = False) -> np.ndarray:
    """Of all images."""
    run, parts = program(reducer, twice), []
    for i in range(0, len(canvases.images), BATCH):
        key = jax.random.fold_in(jax.random.key(seed), i)
        parts.append(np.asarray(run(variables, canvases.images[i : i + BATCH], key)))
    return np.concatenate(parts)


def accuracy(reducer: TokenReducer, variables: Any, canvases: Canvases, seed: int, twice: bool = False) -> float:
    """Share of canvases read right."""
    return float(np.mean(logits(reducer, variables, canvases, seed, twice).argmax(-1) == canvases.labels))


# -- what is compared -------------------------------------------------------------------------------------------------


def at_entry(k: int) -> dict[str, tuple[TokenReducer, bool]]:
    """{name: (reducer, whether it needs a first pass)} that keep k embedded tokens."""

    def votes(iters: int, **more: Any) -> TokenReducer:
        return ZeroTPrune((PruneSpec(0, keep=k, iters=iters, **more),))

    return {
        "PageRank, 5 votes": (votes(5), True),
        "PageRank, 1 vote": (votes(1), True),
        "class token's attention": (TopK("cls", ((0, k),), inside_block=False), True),
        "wrong transpose": (WrongWay(k), True),
        "random": (AtEntry("random", k), False),
        "grid": (AtEntry("grid", k), False),
        "norm": (AtEntry("norm", k), False),
        "DivPrune": (AtEntry("divprune", k), False),
    }


def by_stages(keeps: tuple[int, ...], share: float = 0.0, **more: Any) -> ZeroTPrune:
    """So many patches left after the first blocks, a share of what goes by similarity."""
    specs, n = [], sizes().patches
    for layer, keep in enumerate(keeps):
        remove = min(int(share * (n - keep)), n // 2)
        specs.append(PruneSpec(layer, remove, keep=keep, **more))
        n = keep
    return ZeroTPrune(tuple(specs))


def in_network(keeps: tuple[int, ...]) -> dict[str, TokenReducer]:
    """Reducers of equal multiply-adds: the same numbers of tokens, or as many as the same budget allows."""
    drops = tuple(enumerate(keeps))
    fraction = count_flops(by_stages(keeps), sizes())["fraction"]
    return {
        "Zero-TPrune": by_stages(keeps, SHARE),
        "Zero-TPrune, uniform start": by_stages(keeps, SHARE, boost=False),
        "Zero-TPrune, heads filtered": by_stages(keeps, SHARE, vhf=PAPER_VARIANCES),
        "Zero-TPrune, prune important": by_stages(keeps, SHARE, partition="seq_i"),
        "Zero-TPrune, alternate": by_stages(keeps, SHARE, partition="alternate"),
        "Zero-TPrune, random halves": by_stages(keeps, SHARE, partition="random"),
        "Zero-TPrune, no halves": by_stages(keeps, SHARE, partition="full"),
        "importance, 1 vote": by_stages(keeps, iters=1),
        "importance, 5 votes": by_stages(keeps),
        "importance, 30 votes": by_stages(keeps, iters=30),
        "class token's attention": TopK("cls", drops, inside_block=False),
        "column mean": TopK("column", drops, inside_block=False),
        "random": TopK("random", drops, inside_block=False),
        "EViT, own blocks": topk_for(fraction, sizes(), "cls", fused=True),
        "ATS": ats_for(fraction, sizes()),
        "ToMe": tome_for(fraction, sizes()),
    }


SCORES = ("PageRank, 1 vote", "PageRank, 5 votes", "PageRank, 30 votes", "5 votes, boosted", "5 votes, heads filtered",
          "class token's attention", "column mean")  # fmt: skip


@functools.cache
def scores(block: int) -> Callable[..., Any]:
    """(variables, images) -> scores of all patches in a block of the unreduced model: (names, batch, patches)."""
    module = model()

    def run(variables: Any, x: Any) -> Any:
        found = module.apply(variables, x, layer=block, watch=block, select="full", method="features")
        a = found.seen.weights  # pyright: ignore[reportAttributeAccessIssue]
        even, boosted = (initial_signal(a.shape[-1], 1, b) for b in (False, True))
        rows = [aggregate_heads(wpr_scores(a, n, even)) for n in (1, 5, 30)]
        rows += [
            aggregate_heads(wpr_scores(a, 5, boosted)),
            aggregate_heads(wpr_scores(a, 5, even), "rms", PAPER_VARIANCES),
        ]
        return jnp.stack([*rows, a[:, :, 0].mean(1), a.mean((1, 2))])[:, :, 1:]

    return jax.jit(run)


def auroc(score: np.ndarray, shown: np.ndarray) -> float:
    """Mean over images of the chance that a token with the digit is scored above one without."""
    rank = rankdata(score, axis=1)
    n = shown.sum(1)
    above = (np.where(shown, rank, 0).sum(1) - n * (n + 1) / 2) / (n * (shown.shape[1] - n))
    return float(above.mean())


def localisation(variables: Any, canvases: Canvases) -> dict[str, dict[str, float]]:
    """{block: {score: AUROC}}."""
    out = {}
    for block in range(sizes().depth - 1):
        parts = [np.asarray(scores(block)(variables, canvases.images[i : i + BATCH]))
                 for i in range(0, len(canvases.images), BATCH)]  # fmt: skip
        found = np.concatenate(parts, axis=1)
        out[str(block)] = {name: auroc(s, canvases.shown) for name, s in zip(SCORES, found, strict=True)}
    return out


def measure(setting: Setting, seed: int, progress: Progress) -> dict[str, Any]:
    """All numbers of one model."""
    module, variables = trained(seed, setting.recipe, progress=progress)
    canvases = test_set(seed)
    if setting.images is not None:
        canvases = Canvases(*(a[: setting.images] for a in canvases))
    keeps = {str(k): at_entry(k) for k in setting.kept}
    networks = {"-".join(map(str, s)): in_network(s) for s in setting.schedules}
    total = sum(map(len, keeps.values())) + sum(map(len, networks.values())) + len(COLORS) * len(setting.fractions) + 2
    task = progress.add_task(f"model {seed}", total=total)

    def score(reducer: TokenReducer, twice: bool = False) -> float:
        found = accuracy(reducer, variables, canvases, seed, twice)
        progress.update(task, advance=1)
        return found

    out: dict[str, Any] = {"full": score(TokenReducer()), "localisation": localisation(variables, canvases)}
    out["entry"] = {k: {name: score(*one) for name, one in row.items()} for k, row in keeps.items()}
    out["network"] = {s: {name: score(one) for name, one in row.items()} for s, row in networks.items()}
    out["curves"] = {
        name: {f"{f:g}": score(reducer_for(name, f, sizes())) for f in setting.fractions} for name in COLORS
    }
    gathered = by_stages(setting.schedules[-1], SHARE)
    both = (logits(r, variables, canvases, seed) for r in (gathered, dataclasses.replace(gathered, masked=True)))
    out["hidden against dropped"] = float(np.abs(np.subtract(*both)).max())
    progress.update(task, advance=1)
    held = (canvases.images, canvases.labels)
    calibration = calibration_set(seed, 2 * setting.few)
    out["searched"] = {}
    for f in setting.searched:
        found = search_schedule(
            lambda x, r: module.apply(variables, x, reducer=r), sizes(), f, (calibration.images, calibration.labels), held,
            trials=setting.trials, few=setting.few, keep=4, seed=seed, batch=BATCH, progress=progress,
        )[0]  # fmt: skip
        out["searched"][f"{f:g}"] = {"calibration": found.calibration, "held_out": found.held_out}
    progress.remove_task(task)
    return out


def costs(setting: Setting) -> dict[str, Any]:
    """{"network", "curves"}: shares of multiply-adds, those of choosing tokens apart."""

    def of(reducer: TokenReducer) -> dict[str, float]:
        found, whole = count_flops(reducer, sizes()), count_flops(TokenReducer(), sizes())["blocks"]
        return {"fraction": found["fraction"], "choosing": found["overhead"] / whole}

    curves = {n: {f"{f:g}": of(reducer_for(n, f, sizes())) for f in setting.fractions} for n in COLORS}
    networks = {"-".join(map(str, s)): {n: of(r) for n, r in in_network(s).items()} for s in setting.schedules}
    return {"network": networks, "curves": curves}


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations of everything, in the same places."""

    def together(parts: list[Any]) -> Any:
        if isinstance(parts[0], dict):
            return {k: together([p[k] for p in parts]) for k in parts[0]}
        return record.mean_and_spread(parts)

    return together(seeds)


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What has to hold on means over models; in points of accuracy, of 64 tokens 20 or 32 kept before the first block."""
    full = results["full"]["mean"]
    entry = {k: {n: r["mean"] for n, r in row.items()} for k, row in results["entry"].items()}
    mild, hard = ({n: r["mean"] for n, r in row.items()} for row in list(results["network"].values())[:2])
    votes, diverse = entry["20"]["PageRank, 5 votes"], entry["20"]["DivPrune"]
    return {
        "PageRank in the first block finds the digit: AUROC of at least 0.93":
            results["localisation"]["0"]["PageRank, 5 votes"]["mean"] >= 0.93,
        "20 tokens by PageRank: at most 12 points below all": votes >= full - 0.12,
        "20 tokens by PageRank: at least 35 points above chance": votes >= entry["20"]["random"] + 0.35,
        "20 tokens by PageRank: at least 25 points above the wrong transpose": votes >= entry["20"]["wrong transpose"] + 0.25,
        "24, 12, 8, 6 tokens: all stages are not below importance alone": hard["Zero-TPrune"] >= hard["importance, 5 votes"],
        "44, 32, 24, 16 tokens: at most 2.5 points lost": mild["Zero-TPrune"] >= full - 0.025,
        "hidden and dropped tokens: logits within 1e-4": results["hidden against dropped"]["mean"] <= 1e-4,
        "20 tokens by DivPrune: at least 30 points above chance and above a grid":
            diverse >= max(entry["20"]["random"], entry["20"]["grid"]) + 0.3,
        "20 tokens by DivPrune: at most 15 points below all": diverse >= full - 0.15,
        "32 tokens by DivPrune: at most 7 points below all": entry["32"]["DivPrune"] >= full - 0.07,
    }  # fmt: skip


# -- what is shown ----------------------------------------------------------------------------------------------------


def percent(r: dict[str, float]) -> str:
    """Mean and deviation in per cent."""
    return f"{100 * r['mean']:.1f} ± {100 * r['std']:.1f}"


def tables(results: dict[str, Any]) -> list[Table]:
    """Before the first block, in the network, where the digit is."""
    full = percent(results["full"])
    entry = Table(title=f"accuracy in per cent with so many of 64 tokens from the start (all: {full})")
    networks = Table(title=f"accuracy in per cent with so many tokens after blocks 0 to 3 (all: {full})")
    where = Table(title="AUROC of scores for tokens that show the digit, after each block of the whole model")
    for view, rows, name in (
        (entry, results["entry"], "tokens"), (networks, results["network"], "tokens"), (where, results["localisation"], "block")
    ):  # fmt: skip
        view.add_column("method" if view is not where else "score")
        for k in rows:
            view.add_column(k if view is networks else f"{name} {k}" if view is where else k)
        for method in next(iter(rows.values())):
            shown = [percent(r[method]) if view is not where else f"{r[method]['mean']:.3f}" for r in rows.values()]
            view.add_row(method, *shown)
    return [entry, networks, where]


def draw(stored: dict[str, Any], path: Path) -> None:
    """Accuracy against multiply-adds in the network (left), against tokens kept before the first block (right)."""
    results, cost = stored["results"], stored["costs"]["curves"]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, color in COLORS.items():
        rows = results["curves"][name]
        x = [cost[name][f]["fraction"] for f in rows]
        left.errorbar(x, [100 * r["mean"] for r in rows.values()], [100 * r["std"] for r in rows.values()],
                      color=color, marker="o", ms=3.5, lw=1.2, elinewidth=0.6, label=name)  # fmt: skip
    left.set_xlabel("share of multiply-adds in the blocks")
    left.set_ylabel("accuracy, per cent")
    kept = [int(k) for k in results["entry"]]
    for i, name in enumerate(next(iter(results["entry"].values()))):
        rows = [row[name] for row in results["entry"].values()]
        right.plot(kept, [100 * r["mean"] for r in rows], marker="o", ms=3.5, lw=1.2, color=f"C{i}", label=name)
    right.set_xlabel("of 64 tokens kept before the first block")
    for axis in (left, right):
        axis.axhline(100 * results["full"]["mean"], color="k", lw=0.7, ls=":")
        axis.legend(frameon=False, fontsize=7, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(console: Console, stored: dict[str, Any], picture: Path) -> None:
    """Tables, verdict and figure."""
    wide = Console(width=110 if not console.is_terminal else None)
    for view in tables(stored["results"]):
        wide.print(view)
    for f, found in stored["results"]["searched"].items():
        ready = stored["results"]["curves"]["zero_tprune"].get(f)
        beside = "" if ready is None else f", the ready-made schedule {percent(ready)}"
        console.print(f"at {f} of the multiply-adds a searched schedule: {percent(found['held_out'])}{beside}")
    for what, holds in stored["checks"].items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    draw(stored, picture)
    console.print(f"drawn to {picture}")


def main(
    config: Literal["small"] = "small",
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path | None = None,
    epochs: Annotated[int | None, tyro.conf.arg(help="train the models for so many epochs only")] = None,
    images: Annotated[int | None, tyro.conf.arg(help="so many canvases only")] = None,
    redraw: Annotated[bool, tyro.conf.arg(help="no run: figure and tables from the results file")] = False,
) -> None:
    """Token reducers on a vision transformer trained here."""
    console = Console()
    out = out or RESULTS / f"token-pruning-{config}.json"
    picture = (FIGURES if out.parent == RESULTS else out.parent) / f"token-pruning-{config}.png"
    if redraw:
        report(console, json.loads(out.read_text()), picture)
        return
    setting = Setting(Recipe() if epochs is None else Recipe(epochs), images=images)
    if images is not None:  # a short look
        setting = dataclasses.replace(setting, fractions=(0.6,), trials=2, few=8)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    per_seed = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for seed in progress.track(seeds, description="models"):
            per_seed.append(measure(setting, seed, progress))
    results = summary(per_seed)
    stored = {
        **record.heading("token_pruning", config, seeds, setting),
        "checks": checks(results),
        "results": results,
        "costs": costs(setting),
        "seeds": dict(zip(map(str, seeds), per_seed, strict=True)),
    }
    record.write(out, stored)
    report(console, stored, picture)
    console.print(f"written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
