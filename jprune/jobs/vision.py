"""A vision transformer on fewer tokens: what it costs and how well it still answers, on a folder of pictures.

summary.json       before and after
report.html        the same to read, with the tokens and multiply-adds of every block
kept.png           which patches each block still had, picture by picture
predictions.jsonl  one line a picture: its file, both answers, and the label where there is one

Weights are as they were: only how many tokens the blocks compute with changes. Images are spread over all devices.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.progress import Progress

from jprune.checkpoint.vision import Vision, load_vision
from jprune.data.images import ImageFolder
from jprune.files.atomic import whole_folder, write_json
from jprune.files.lock import FolderLock
from jprune.methods.tokens import cost as flops
from jprune.methods.tokens.reducers_by_name import reducer_for
from jprune.methods.tokens.search import search_schedule
from jprune.models.token_hook import TokenReducer
from jprune.report import measure, page
from jprune.report.patches import Shown, kept_patches
from jprune.training.progress import display


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """What is evaluated.

    Attributes:
      model: folder (or file) of a vision transformer.
      data: folder of class folders with pictures, or of pictures.
      tokens: how tokens are reduced; a name of `jprune.methods.tokens.reducers_by_name`.
      flops: share of the blocks' multiply-adds to keep, in (0, 1].
      batch_size: images computed at once.
      images: at most so many, drawn by `seed`; 0: all.
      search: so many schedules are tried on a part of the pictures, and the best is taken; 0: the ready-made one.
      search_images: pictures for that, at most half of them; they do not count in what is reported.
      pictures: of kept.png.
      heads: attention heads, where the files do not say.
      dtype: to compute in; None: as stored.
      seed: of the draw of images and of reducers that draw.
    """

    model: str
    data: str
    tokens: str = "zero_tprune"
    flops: float = 0.65
    batch_size: int = 32
    images: int = 0
    search: int = 0
    search_images: int = 512
    pictures: int = 6
    heads: int | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.flops <= 1:
            raise ValueError(f"flops is {self.flops}: it is the share to keep, above 0 and up to 1")
        for name, least in (("batch_size", 1), ("images", 0), ("search", 0), ("search_images", 1), ("pictures", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.search and self.tokens != "zero_tprune":
            raise ValueError(f"schedules are searched for zero_tprune only, not for {self.tokens}: leave --search out")


class MeasuredTokens(NamedTuple):
    """One way to run the model.

    Attributes:
      accuracy: share of right answers; None without labels.
      agreement: share of answers that are the unreduced model's.
      macs: multiply-adds of an image, all of the model; choosing: of the choice of tokens, in addition.
      share: of the unreduced blocks' multiply-adds.
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
    dims: flops.Dims
    reducer: TokenReducer
    files: Sequence[str]
    answers: tuple[np.ndarray, np.ndarray]
    labels: np.ndarray | None
    before: MeasuredTokens
    after: MeasuredTokens
    batch: int
    shown: Sequence[Shown]
    note: str


def evaluate_tokens(options: TokenOptions, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Run a model with all its tokens and with fewer, and write what came out; returns what summary.json says.

    Raises:
      ValueError: options, a model, pictures or a reducer that do not go together; `out` holds something else.
    """
    if out.exists() and not (out / "predictions.jsonl").is_file():
        raise ValueError(f"{out} exists and holds no evaluation: choose another --out")
    with FolderLock(out), display(not quiet) as progress:
        return _evaluate(options, out, progress)


def _evaluate(options: TokenOptions, out: Path, progress: Progress) -> dict[str, Any]:
    task = progress.add_task("loading", total=1)
    vision = load_vision(options.model, heads=options.heads, dtype=options.dtype)
    if not vision.module.config.num_classes:
        raise ValueError(f"{options.model} has no classifier, so its answers cannot be compared: give one that has")
    folder, labelled, note = pictures_of(options.data, vision)
    side = vision.preprocess.size
    dims = flops.dims_of(vision.module.config, (side, side, 3))
    reducer = reducer_for(options.tokens, options.flops, dims)
    progress.update(task, advance=1)
    rng = np.random.default_rng(options.seed)
    chosen = np.arange(len(folder))
    if options.images and options.images < len(folder):
        chosen = np.sort(rng.choice(chosen, options.images, replace=False))
    if options.search:
        if len(chosen) < 2:
            raise ValueError("a search needs at least two pictures: one to try schedules on, one to report")
        tried = np.sort(rng.choice(chosen, min(options.search_images, len(chosen) // 2), replace=False))
        chosen = np.setdiff1d(chosen, tried)
        reducer = _searched(options, out, vision, folder, labelled, tried, dims, progress)

    size, place = _placement(min(options.batch_size, len(chosen)))
    variables = place(vision.variables, False)
    key = jax.random.key(options.seed)

    def program(reducer: TokenReducer | None, trace: bool = False) -> Callable[..., Any]:
        return jax.jit(lambda v, x: vision.module.apply(v, x, reducer=reducer, key=key, trace=trace))

    whole, fewer, traced = program(None), program(reducer), program(reducer, trace=True)
    answers: list[list[Any]] = [[], []]
    bar = progress.add_task("images", total=len(chosen))
    for images, n in batches(folder, chosen, size):
        x = place(images, True)
        for kept, run in zip(answers, (whole, fewer), strict=True):
            kept.append(np.asarray(run(variables, x).argmax(-1))[:n])
        progress.update(bar, advance=n)
    both = [np.concatenate(a) for a in answers]
    task = progress.add_task("timing", total=1)
    batch = place(next(batches(folder, chosen, size))[0], True)
    ms = measure.interleaved({"before": (whole, (variables, batch)), "after": (fewer, (variables, batch))}, 9)
    progress.update(task, advance=1)

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
        return _write(unfinished, options, found)


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


def _searched(options: TokenOptions, out: Path, vision: Vision, folder: ImageFolder, labelled: bool, tried: np.ndarray,
              dims: flops.Dims, progress: Progress) -> TokenReducer:  # fmt: skip
    """The best of many schedules on these pictures; tried ones are written beside `out`, so that a search can go on."""
    parts = [folder.read(tried[i : i + 256])["image"] for i in range(0, len(tried), 256)]

    def apply(x: Any, reducer: TokenReducer) -> Any:
        return vision.module.apply(vision.variables, x, reducer=reducer)

    found = search_schedule(
        apply, dims, options.flops,
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
    name: str, reducer: TokenReducer, dims: flops.Dims, size: int, ms: float, found: Any, whole: Any, labels: Any
) -> MeasuredTokens:
    cost = flops.count_flops(reducer, dims)
    accuracy = None if labels is None else float(np.mean(found == labels))
    return MeasuredTokens(accuracy, float(np.mean(found == whole)), cost["total"], cost["overhead"], cost["fraction"], ms,
                          1e3 * size / ms, flops.counts(reducer, dims)[1])  # fmt: skip


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


def _write(folder: Path, options: TokenOptions, e: Evaluation) -> dict[str, Any]:
    summary = {
        "options": dataclasses.asdict(options),
        "reducer": repr(e.reducer),
        "images": len(e.files),
        "before": e.before._asdict(),
        "after": e.after._asdict(),
        "speed_up": e.before.latency_ms / e.after.latency_ms,
        "ideal_speed_up": e.before.macs / (e.after.macs + e.after.choosing),
        "tokens": [list(c) for c in flops.counts(e.reducer, e.dims)[0]],
        "note": e.note,
        "device": jax.devices()[0].device_kind,
    }
    with (folder / "predictions.jsonl").open("w") as lines:
        for k, file in enumerate(e.files):
            said = {"file": file, "all": int(e.answers[0][k]), "reduced": int(e.answers[1][k])}
            if e.labels is not None:
                said["label"] = int(e.labels[k])
            lines.write(json.dumps(said) + "\n")
    figures = []
    if e.shown:
        kept_patches(folder / "kept.png", e.shown)
        figures.append(("Patches that are left", folder / "kept.png"))
    notes = [
        f"{options.tokens}: {options.flops:.0%} of the blocks' multiply-adds asked for, {e.after.share:.1%} found.",
        f"{len(e.files)} pictures; timed on {summary['device']} in batches of {e.batch}.",
        *([e.note] if e.note else []),
    ]
    settings = {**dataclasses.asdict(options), "reducer": e.reducer}
    title = f"{Path(options.model).name} on fewer tokens"
    page.write(folder / "report.html", title, rows(summary), settings, figures, notes, _layers(e.dims, e.reducer))
    write_json(folder / "summary.json", summary)
    return summary


def _layers(dims: flops.Dims, reducer: TokenReducer) -> list[tuple[str, ...]]:
    """The table of blocks."""
    out: list[tuple[str, ...]] = [("block", "tokens in attention", "in MLP", "multiply-adds, millions")]
    for i, (block, n) in enumerate(zip(dims.blocks, flops.counts(reducer, dims)[0], strict=True)):
        macs = flops.block_macs(block, dims.width, n)
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
        ("GFLOPs an image", *(f"{s['macs'] / 1e9:.3f}" for s in (a, b)), f"{b['macs'] / a['macs']:.2f}x"),
        ("choosing, in addition", "", f"{b['choosing'] / 1e9:.4f}", ""),
        ("tokens at the end", f"{a['tokens']}", f"{b['tokens']}", f"{b['tokens'] / a['tokens']:.2f}x"),
        ("images a second", *(f"{s['images_per_second']:,.1f}" for s in (a, b)),
         f"{summary['speed_up']:.2f}x (ideal {summary['ideal_speed_up']:.2f}x)"),
    ]  # fmt: skip
    return out
