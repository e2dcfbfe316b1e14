"""A vision transformer on fewer tokens: what it costs and how well it still answers, on a folder of pictures.

summary.json       before and after
report.html        the same to read, with the tokens and MACs of every block
kept.png           which patches each block still had, picture by picture
predictions.jsonl  one line a picture: its file, both answers, and the label where there is one

Weights are as they were: only how many tokens the blocks compute with changes. Images are spread over all devices.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.progress import Progress

from jprune.checkpoint.vision import Vision, load_vision
from jprune.data.images import ImageFolder
from jprune.files.atomic import whole_folder
from jprune.jobs.outputs import write_report
from jprune.methods.contract import Amount, checked
from jprune.methods.tokens import cost
from jprune.methods.tokens.reducers_by_name import reducer_for
from jprune.methods.tokens.search import search_schedule
from jprune.models.token_hook import TokenReducer
from jprune.report import measure
from jprune.report.patches import Shown, kept_patches
from jprune.training.run_folder import RunFolder

USUAL = 0.65  # share of the MACs that stays where nothing is asked for


@dataclasses.dataclass(frozen=True)
class VisionEvalConfig:
    """What is evaluated.

    Attributes:
      model: folder of a vision transformer (timm's, transformers', torchvision's, AugReg's .npz), or of a language model
      data: folder of pictures, or of one folder of pictures a class
      tokens: how tokens are reduced; see `jprune list`
      sparsity: share of the blocks' MACs to REMOVE
      keep: share of the blocks' MACs to KEEP, in place of --sparsity
      batch_size: examples at a time
      images: at most so many pictures, drawn by --seed; 0: all
      search: zero_tprune: try so many schedules on a part of the pictures first
      search_images: pictures to try them on, at most half of all
      pictures: so many of them are drawn with the patches that are left
      heads: attention heads, where the files do not say
      dtype: to compute in, else as stored
      seed: of what is drawn
    """

    model: str
    data: str
    tokens: str = "zero_tprune"
    sparsity: float | None = None
    keep: float | None = None
    batch_size: int = 32
    images: int = 0
    search: int = 0
    search_images: int = 512
    pictures: int = 6
    heads: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.share  # which says what is wrong with it
        checked(self, {
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "images": (self.images >= 0, "at least 0"),
            "search": (self.search >= 0, "at least 0"),
            "search_images": (self.search_images >= 1, "at least 1"),
            "pictures": (self.pictures >= 0, "at least 0"),
        })  # fmt: skip
        if self.search and self.tokens != "zero_tprune":
            raise ValueError(f"schedules are searched for zero_tprune only, not for {self.tokens}: leave --search out")

    @property
    def share(self) -> float:
        """Of the blocks' MACs that stays."""
        if self.keep is None and self.sparsity is None:
            return USUAL
        return Amount.of("macs", keep=self.keep, sparsity=self.sparsity).keep


class MeasuredTokens(NamedTuple):
    """One way to run the model.

    Attributes:
      accuracy: share of right answers; None without labels.
      agreement: share of answers that are the unreduced model's.
      macs: MACs of an image, all of the model; choosing: of the choice of tokens, in addition.
      share: of the unreduced blocks' MACs.
      latency_ms: median milliseconds of a batch; images_per_second follows from it.
      tokens: after the last block.
    """

    accuracy: float | None
    agreement: float
    macs: float
    choosing: float
    share: float
    latency_ms: float
    images_per_second: float
    tokens: int


class Evaluation(NamedTuple):
    """All that came out, before it is written.

    Attributes:
      vision, dims, reducer: the model, its sizes, what reduced its tokens.
      files: of the pictures, within their folder.
      answers: of the whole model and of the reduced one.
      labels: right answers, or None.
      before, after: what was measured.
      batch: images computed at once.
      shown: pictures to draw.
      note: on labels.
    """

    vision: Vision
    dims: cost.Dims
    reducer: TokenReducer
    files: Sequence[str]
    answers: tuple[np.ndarray, np.ndarray]
    labels: np.ndarray | None
    before: MeasuredTokens
    after: MeasuredTokens
    batch: int
    shown: Sequence[Shown]
    note: str


def evaluate_tokens(options: VisionEvalConfig, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Run a model with all its tokens and with fewer, and write what came out; returns what summary.json says.

    Raises:
      ValueError: options, a model, pictures or a reducer that do not go together; `out` holds something else.
    """
    run = RunFolder(out, quiet)
    with run.claim(dataclasses.asdict(options), replaces="predictions.jsonl"):
        try:
            with run.shown():
                return _evaluate(options, out, run)
        finally:
            run.release()


def _evaluate(options: VisionEvalConfig, out: Path, run: RunFolder) -> dict[str, Any]:
    with run.phase("loading"):
        vision = load_vision(options.model, heads=options.heads, dtype=options.dtype)
    if not vision.module.config.num_classes:
        raise ValueError(f"{options.model} has no classifier, so its answers cannot be compared: give one that has")
    folder, labelled, note = pictures_of(options.data, vision)
    side = vision.preprocess.size
    dims = cost.dims_of(vision.module.config, (side, side, 3))
    reducer = reducer_for(options.tokens, options.share, dims)
    rng = np.random.default_rng(options.seed)
    chosen = np.arange(len(folder))
    if options.images and options.images < len(folder):
        chosen = np.sort(rng.choice(chosen, options.images, replace=False))
    if options.search:
        if len(chosen) < 2:
            raise ValueError("a search needs at least two pictures: one to try schedules on, one to report")
        tried = np.sort(rng.choice(chosen, min(options.search_images, len(chosen) // 2), replace=False))
        chosen = np.setdiff1d(chosen, tried)
        reducer = _searched(options, out, vision, folder, labelled, tried, dims, run.bars)

    size, place = _placement(min(options.batch_size, len(chosen)))
    variables = place(vision.variables, False)
    key = jax.random.key(options.seed)

    def program(reducer: TokenReducer | None, trace: bool = False) -> Callable[..., Any]:
        return jax.jit(lambda v, x: vision.module.apply(v, x, reducer=reducer, key=key, trace=trace))

    whole, fewer, traced = program(None), program(reducer), program(reducer, trace=True)
    answers: list[list[Any]] = [[], []]
    bar = run.bars.add_task("images", total=len(chosen))
    for images, n in batches(folder, chosen, size):
        x = place(images, True)
        for kept, answer in zip(answers, (whole, fewer), strict=True):
            kept.append(np.asarray(answer(variables, x).argmax(-1))[:n])
        run.bars.update(bar, advance=n)
    both = [np.concatenate(a) for a in answers]
    with run.phase("timing"):
        batch = place(next(batches(folder, chosen, size))[0], True)
        ms = measure.interleaved({"before": (whole, (variables, batch)), "after": (fewer, (variables, batch))}, 9)

    labels = folder.labels[chosen] if labelled else None
    before, after = (
        _measured(name, r, dims, size, ms[name], found, both[0], labels)
        for name, r, found in (("before", TokenReducer(), both[0]), ("after", reducer, both[1]))
    )
    found = Evaluation(
        vision, dims, reducer, [str(folder.files[i].relative_to(folder.folder)) for i in chosen], (both[0], both[1]), labels,
        before, after, size, (), note)  # fmt: skip
    found = found._replace(
        shown=_shown(options.pictures, found, folder, chosen, lambda x: traced(variables, place(x, True))[1])
    )
    with whole_folder(out, overwrite=True) as unfinished:
        return _write(run, unfinished, options, found)


def pictures_of(data: str, vision: Vision) -> tuple[ImageFolder, bool, str]:
    """(pictures, whether their labels are the model's classes, a note on that)."""
    plain = vision.preprocess.folder(data)
    if not plain.labelled:
        return plain, False, "The pictures have no labels: answers are compared with the unreduced model's only."
    classes = vision.module.config.num_classes
    names = vision.labels or ()
    numbers = tuple(map(str, range(classes)))
    for known in (names, numbers):
        if known and set(plain.classes) <= set(known):
            return vision.preprocess.folder(data, known), True, ""
    if len(plain.classes) == classes:
        return plain, True, "Folders were numbered in the order of their names."
    note = (
        f"The {len(plain.classes)} folders are not named like the model's {classes} classes, nor by their numbers: answers are "
        "compared with the unreduced model's only."
    )
    return plain, False, note


def _searched(options: VisionEvalConfig, out: Path, vision: Vision, folder: ImageFolder, labelled: bool, tried: np.ndarray,
              dims: cost.Dims, progress: Progress) -> TokenReducer:  # fmt: skip
    """The best of many schedules on these pictures; tried ones are written beside `out`, so that a search can go on."""
    parts = [folder.read(tried[i : i + 256])["image"] for i in range(0, len(tried), 256)]

    def apply(x: Any, reducer: TokenReducer) -> Any:
        return vision.module.apply(vision.variables, x, reducer=reducer)

    found = search_schedule(
        apply, dims, options.share,
        (np.concatenate(parts), folder.labels[tried] if labelled else None), trials=options.search, seed=options.seed,
        objective="accuracy" if labelled else "kl", batch=options.batch_size, log=out.with_name(out.name + ".search.jsonl"),
        progress=progress,
    )  # fmt: skip
    return found[0].reducer


def _placement(wanted: int) -> tuple[int, Callable[[Any, bool], Any]]:
    """(images of a batch: a multiple of the devices, placer of trees and of batches)."""
    devices = jax.devices()
    if len(devices) == 1:
        return wanted, lambda tree, spread: jax.tree.map(jnp.asarray, tree)
    mesh = Mesh(np.array(devices), ("data",))
    size = -(-wanted // len(devices)) * len(devices)

    def place(tree: Any, spread: bool) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data") if spread else PartitionSpec()))

    return size, place


def batches(folder: ImageFolder, chosen: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(images, how many of them count); the last batch is filled up with its first image."""
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        yield folder.read(np.concatenate([part, np.repeat(part[:1], size - len(part))]))["image"], len(part)


def _measured(
    name: str, reducer: TokenReducer, dims: cost.Dims, size: int, ms: float, found: Any, whole: Any, labels: Any
) -> MeasuredTokens:
    macs = cost.count_macs(reducer, dims)
    accuracy = None if labels is None else float(np.mean(found == labels))
    return MeasuredTokens(accuracy, float(np.mean(found == whole)), macs["total"], macs["overhead"], macs["fraction"], ms,
                          1e3 * size / ms, cost.counts(reducer, dims)[1])  # fmt: skip


def _shown(
    pictures: int, e: Evaluation, folder: ImageFolder, chosen: np.ndarray, passed_of: Callable[[Any], Any]
) -> list[Shown]:
    """Some pictures, evenly over the folder, with the patches that each block still had."""
    n = min(pictures, len(chosen), e.batch)
    if not n:
        return []
    places = np.linspace(0, len(chosen) - 1, n).round().astype(int)
    images, _ = next(batches(folder, chosen[places], e.batch))
    passed, patch = passed_of(images), e.vision.module.config.patch
    grid = images.shape[1] // patch, images.shape[2] // patch
    prefix, pre = e.dims.prefix, e.vision.preprocess
    pixels = np.clip(images[:n] * (255 * np.array(pre.std)) + 255 * np.array(pre.mean), 0, 255).round().astype(np.uint8)
    out = []
    for i, k in enumerate(places):
        stages: list[tuple[str, np.ndarray]] = []
        for block, (index, alive) in enumerate(zip(passed.index, passed.alive, strict=True)):
            of_image = np.asarray(index[i] if alive is None else jnp.where(alive[i], index[i], -1))
            patches = np.unique(of_image[of_image >= prefix]) - prefix
            if len(patches) != (len(stages[-1][1]) if stages else e.dims.patches):
                where = f"into block {block}" if block < len(passed.index) - 1 else "at the end"
                stages.append((f"{where}: {len(patches)}", patches))
        one, two = (_class(e.vision, answer[k]) for answer in e.answers)
        out.append(Shown(pixels[i], grid, f"{Path(e.files[int(k)]).name}\nall: {one}, reduced: {two}", tuple(stages)))
    return out


def _class(vision: Vision, number: Any) -> str:
    return vision.labels[int(number)] if vision.labels else str(int(number))


def _write(run: RunFolder, folder: Path, options: VisionEvalConfig, e: Evaluation) -> dict[str, Any]:
    summary = {
        "options": dataclasses.asdict(options),
        "reducer": repr(e.reducer),
        "images": len(e.files),
        "before": e.before._asdict(),
        "after": e.after._asdict(),
        "speed_up": e.before.latency_ms / e.after.latency_ms,
        "ideal_speed_up": e.before.macs / (e.after.macs + e.after.choosing),
        "tokens": [list(c) for c in cost.counts(e.reducer, e.dims)[0]],
        "note": e.note,
    }
    with (folder / "predictions.jsonl").open("w") as lines:
        for k, file in enumerate(e.files):
            said = {"file": file, "all": int(e.answers[0][k]), "reduced": int(e.answers[1][k])}
            if e.labels is not None:
                said["label"] = int(e.labels[k])
            lines.write(json.dumps(said) + "\n")
    figures = []
    if e.shown:
        figures.append(("Patches that are left", "kept", lambda p: kept_patches(p, e.shown)))
    notes = [
        f"{options.tokens}: {options.share:.0%} of the blocks' MACs asked for, {e.after.share:.1%} found.",
        f"{len(e.files)} pictures; timed on {jax.devices()[0].device_kind} in batches of {e.batch}.",
        *([e.note] if e.note else []),
    ]
    settings = {**dataclasses.asdict(options), "reducer": e.reducer}
    title = f"{Path(options.model).name} on fewer tokens"
    return write_report(
        run, title, rows(summary), settings, figures, notes, _layers(e.dims, e.reducer), summary, folder
    )


def _layers(dims: cost.Dims, reducer: TokenReducer) -> list[tuple[str, ...]]:
    """The table of blocks."""
    out: list[tuple[str, ...]] = [("block", "tokens in attention", "in MLP", "MACs, millions")]
    for i, (block, n) in enumerate(zip(dims.blocks, cost.counts(reducer, dims)[0], strict=True)):
        macs = cost.block_macs(block, dims.width, n)
        out.append((str(i), f"{n.attention:g}", f"{n.mlp:g}", f"{macs / 1e6:,.1f}"))
    return out


def rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table before/after; its first row is the header."""
    a, b = summary["before"], summary["after"]
    out = [("", "all tokens", "reduced", "change")]
    if a["accuracy"] is not None:
        change = f"{100 * (b['accuracy'] - a['accuracy']):+.2f} points"
        out.append(("accuracy", f"{a['accuracy']:.2%}", f"{b['accuracy']:.2%}", change))
    out += [
        ("same answer as with all", "100.00%", f"{b['agreement']:.2%}", ""),
        ("GMACs an image", *(f"{s['macs'] / 1e9:.3f}" for s in (a, b)), f"{b['macs'] / a['macs']:.2f}x"),
        ("choosing, in addition", "", f"{b['choosing'] / 1e9:.4f}", ""),
        ("tokens at the end", f"{a['tokens']}", f"{b['tokens']}", f"{b['tokens'] / a['tokens']:.2f}x"),
        ("images a second", *(f"{s['images_per_second']:,.1f}" for s in (a, b)),
         f"{summary['speed_up']:.2f}x (ideal {summary['ideal_speed_up']:.2f}x)"),
    ]  # fmt: skip
    return out
