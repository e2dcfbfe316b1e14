"""Monte-Carlo search of a Zero-TPrune schedule under a budget: schedules are drawn, and what answers best is kept.

Dropping tokens costs nothing to set up, so that hundreds of schedules can be tried on a few images (section "MC simulation" of
Wang, Dedhia and Jha, CVPR 2024). Every draw is scaled to the budget before it is tried.
  Stage 1: all draws on few images. Tokens are hidden rather than dropped, so that one compiled program serves every schedule.
  Stage 2: the best of them on all calibration images, with tokens dropped; and on held-out ones, whose score is the one to quote.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.progress import Progress

from jprune.files.json_files import Fields, parse_json, said_of
from jprune.methods.tokens.cost import Dims, count_macs
from jprune.methods.tokens.schedules import check_fraction, fitted, share
from jprune.methods.tokens.zero_tprune import PAPER_VARIANCES, PruneSpec, ZeroTPrune, most_important, without_duplicates
from jprune.models.token_hook import Seen, TokenReducer, Tokens
from jprune.training.progress import bar

Apply = Callable[[Array, TokenReducer], Array]
TRIES = 100  # draws for one trial that no factor brings to the budget


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """What is drawn: how many blocks to drop after, the similarity stage's part in it, votes, start, heads that count."""

    blocks: tuple[int, int] = (2, 6)
    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5)
    iters: tuple[int, ...] = (1, 5, 10, 30)
    boosts: tuple[bool, ...] = (True, False)
    variances: tuple[tuple[float, float] | None, ...] = (None, PAPER_VARIANCES, (0.0, 3.0))


class Found(NamedTuple):
    """A schedule and what it scored: on few images, on the calibration images, on held-out ones (None without them)."""

    reducer: ZeroTPrune
    trial: int
    few: float
    calibration: float
    held_out: float | None
    macs: dict[str, float]


def draw(space: SearchSpace, dims: Dims, fraction: float, seed: int, trial: int, tolerance: float = 0.01) -> ZeroTPrune:
    """The schedule of a trial: drawn by (seed, trial), scaled to at most `fraction` and at least 1 - tolerance of it.

    Raises:
      ValueError: a budget outside (0, 1], or one that a hundred draws did not meet.
    """
    check_fraction(fraction)
    if dims.depth < 2:
        raise ValueError(f"a model of {dims.depth} block has nothing to save by dropping tokens after it")
    rng = np.random.default_rng((seed, trial))
    most = dims.depth - 1  # nothing follows the last block
    for _ in range(TRIES):
        number = int(rng.integers(min(space.blocks[0], most), min(space.blocks[1], most) + 1))
        layers = sorted(rng.choice(most, number, replace=False).tolist())
        when = np.cumsum(rng.dirichlet(np.ones(number)))
        parts = rng.choice(space.shares, number)
        votes = sorted(rng.choice(space.iters, number).tolist(), reverse=True)
        boost = dims.prefix > 0 and bool(rng.choice(space.boosts))
        vhf = space.variances[int(rng.integers(len(space.variances)))]

        def kept_at(strength: float, when: np.ndarray = when) -> list[int]:
            return [max(1, int(dims.patches * (1 - strength) ** w + 1e-9)) for w in when]

        try:
            kept, _ = fitted(dims, fraction, layers, kept_at, inside=False)
        except ValueError:  # these blocks come too late for the budget
            continue
        specs, n = [], dims.patches
        for layer, keep, part, iters in zip(layers, kept, parts, votes, strict=True):
            remove = min(int(part * (n - keep) + 1e-9), n // 2)
            specs.append(PruneSpec(layer, remove, keep=keep, iters=iters, boost=boost, vhf=vhf))
            n = keep
        reducer = ZeroTPrune(tuple(specs))
        if share(dims, layers, kept, inside=False) >= fraction * (1 - tolerance):
            return reducer
    raise ValueError(
        f"none of {TRIES} schedules leaves {fraction:.3f} of the MACs within {tolerance:.0%}: "
        "ask for more, or for a wider tolerance"
    )


class Numbers(NamedTuple):
    """A schedule as arrays: per block the near-duplicates to drop, patches to keep and votes; start, and variances that count."""

    remove: Int[Array, " depth"]
    keep: Int[Array, " depth"]
    iters: Int[Array, " depth"]
    boost: Bool[Array, ""]
    variances: Float[Array, " 2"]


def numbers(reducer: ZeroTPrune, dims: Dims) -> Numbers:
    """Arrays of a schedule whose start and variances are the same in all blocks."""
    remove, iters = np.zeros(dims.depth, np.int32), np.ones(dims.depth, np.int32)
    keep = np.full(dims.depth, dims.patches, np.int32)
    for s in reducer.specs:
        remove[s.layer], keep[s.layer], iters[s.layer] = s.remove, s.keep, s.iters
    first = reducer.specs[0]
    variances = np.array((0.0, np.inf) if first.vhf is None else first.vhf, np.float32)
    return Numbers(*map(jnp.asarray, (remove, keep, iters, first.boost, variances)))


@dataclasses.dataclass(frozen=True)
class Hiding(TokenReducer):
    """Zero-TPrune with traced numbers: tokens are hidden, and one program serves all schedules. Made within a jitted function."""

    numbers: Numbers

    def reads_weights(self, layer: int) -> bool:
        return True

    def after(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        n = self.numbers
        spec = PruneSpec(layer, iters=n.iters[layer], boost=n.boost, vhf=n.variances)
        if tokens.alive is None:
            tokens = tokens._replace(alive=jnp.ones(tokens.x.shape[:2], bool))
        tokens = tokens._replace(alive=without_duplicates(tokens, seen, spec, n.remove[layer]))
        return tokens._replace(alive=most_important(tokens, seen, spec, n.keep[layer]))


def as_data(reducer: ZeroTPrune) -> list[dict[str, Any]]:
    """A schedule as plain data, for JSON."""
    return [dataclasses.asdict(s) for s in reducer.specs]


def from_data(specs: Sequence[dict[str, Any]]) -> ZeroTPrune:
    """The schedule of `as_data`."""
    return ZeroTPrune(tuple(PruneSpec(**{**s, "vhf": s["vhf"] and tuple(s["vhf"])}) for s in specs))


class _Log:
    """JSON lines of a search: its settings, then one line for every score, so that it can go on where it stopped."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.scores: dict[tuple[str, int], float] = {}
        if self.path is None:
            return
        lines: list[dict[str, Any]] = [{"settings": settings}]
        if self.path.exists():
            found: list[dict[str, Any]] = []
            for line in self.path.read_text().splitlines():
                try:
                    found.append(parse_json(line))
                except ValueError:  # cut off while it was written
                    break
            if found and found[0] != json.loads(json.dumps(lines[0])):
                raise ValueError(
                    f"{self.path} is the log of another search (model sizes, data or settings differ): "
                    "give another file, or remove it"
                )
            lines = found or lines
        with said_of(self.path):
            entries = [Fields(e, f"line {i}") for i, e in enumerate(lines[1:], 2)]
            for e in entries:
                if not isinstance(e.get("score"), float | int):  # NaN is one that a model may have
                    raise ValueError(f"{e.name} has no score: remove the line")
                self.scores[e.text("stage"), e.integer("trial")] = float(e["score"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(e) + "\n" for e in lines))

    def score(self, stage: str, trial: int, reducer: ZeroTPrune, measure: Callable[[], float]) -> float:
        """From the log, or measured and logged."""
        if (stage, trial) not in self.scores:
            self.scores[stage, trial] = value = measure()
            if self.path is not None:
                entry = {"stage": stage, "trial": trial, "score": value, "schedule": as_data(reducer)}
                with self.path.open("a") as f:
                    f.write(json.dumps(entry) + "\n")
        return self.scores[stage, trial]


def search_schedule(
    apply: Apply,
    dims: Dims,
    fraction: float,
    calibration: tuple[Any, Any],
    held_out: tuple[Any, Any] | None = None,
    *,
    space: SearchSpace = SearchSpace(),
    trials: int = 500,
    few: int = 256,
    keep: int = 8,
    tolerance: float = 0.01,
    seed: int = 0,
    objective: str = "accuracy",
    batch: int = 128,
    log: str | Path | None = None,
    progress: bool | Progress = False,
) -> list[Found]:
    """The `keep` best schedules of a search, the best on the calibration images first. Host-side.

    Arguments:
      apply: (images, reducer) -> logits; jit-able.
      dims: of the model.
      fraction: of the unreduced blocks' MACs.
      calibration: (images, labels); labels may be None with objective "kl".
      held_out: images and labels that choose nothing; scored by the same objective.
      space: what is drawn.
      trials: schedules of stage 1.
      few: calibration images of stage 1, the first ones.
      keep: schedules that reach stage 2.
      tolerance: how far below the budget a schedule may be, relative; small models have few tokens, and need more.
      seed: of the draws.
      objective: "accuracy", or "kl": minus the divergence from the unreduced model's answers, which needs no labels.
      batch: images at a time.
      log: JSON lines; a search that finds its own goes on where it stopped.
      progress: a bar.

    Raises:
      ValueError: an unknown objective, no labels for accuracies, a budget out of reach, the log of another search.
    """
    if objective not in ("accuracy", "kl"):
        raise ValueError(f"objective must be 'accuracy' or 'kl', not {objective!r}")
    if objective == "accuracy" and (calibration[1] is None or (held_out is not None and held_out[1] is None)):
        raise ValueError("accuracies need labels: give them, or use objective='kl'")
    settings = {
        "fraction": fraction, "dims": dataclasses.asdict(dims), "space": dataclasses.asdict(space), "few": few, "seed": seed,
        "tolerance": tolerance,
        "objective": objective, "data": _fingerprint(*calibration, *(held_out or ())),
    }  # fmt: skip
    written = _Log(log, settings)
    hidden = jax.jit(lambda images, n: apply(images, Hiding(n)))
    whole = jax.jit(lambda images: apply(images, TokenReducer()))

    def scorer(data: tuple[Any, Any]) -> Callable[[Callable[[Any], Any]], float]:
        images, target = data
        if objective == "kl":
            target = np.concatenate([np.asarray(whole(x)) for x in _batches(images, batch)])

        def score(program: Callable[[Any], Any]) -> float:
            answers = np.concatenate([np.asarray(program(x)) for x in _batches(images, batch)])
            return _accuracy(answers, target) if objective == "accuracy" else -_divergence(target, answers)

        return score

    images, labels = calibration
    on_few = scorer((images[:few], None if labels is None else labels[:few]))
    schedules = {}
    with bar(progress, trials, "schedules on few images") as update:
        for i in range(trials):
            schedules[i] = one = draw(space, dims, fraction, seed, i, tolerance)
            n = numbers(one, dims)
            value = written.score("few", i, one, lambda n=n: on_few(lambda x: hidden(x, n)))
            update(i + 1, f"{value:.4f}")
    best = sorted(schedules, key=lambda i: (-written.scores["few", i], i))[:keep]
    on_all = {"calibration": scorer(calibration)} | ({} if held_out is None else {"held out": scorer(held_out)})
    found = []
    with bar(progress, len(best), "the best on all images") as update:
        for k, i in enumerate(best):
            one = schedules[i]
            program = jax.jit(lambda x, one=one: apply(x, one))
            scores = {s: written.score(s, i, one, lambda m=m, p=program: m(p)) for s, m in on_all.items()}
            cost = count_macs(one, dims)
            found.append(
                Found(one, i, written.scores["few", i], scores["calibration"], scores.get("held out"), cost)
            )  # fmt: skip
            update(k + 1, f"{scores['calibration']:.4f}")
    return sorted(found, key=lambda f: (-f.calibration, f.trial))


def _batches(images: Any, size: int) -> list[Any]:
    return [images[i : i + size] for i in range(0, len(images), size)]


def _accuracy(answers: np.ndarray, labels: Any) -> float:
    return float(np.mean(answers.argmax(-1) == np.asarray(labels)))


def _divergence(whole: np.ndarray, answers: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the answers' distribution from the whole model's."""
    a, b = (
        x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True) for x in (whole, answers)
    )
    return float((np.exp(a) * (a - b)).sum(-1).mean())


def _fingerprint(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(b"none" if a is None else np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()[:16]
