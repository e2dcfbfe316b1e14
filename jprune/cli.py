"""The command line: `jprune prune`, `jprune eval`, `jprune chat`, `jprune explain`, `jprune list`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

Text = Annotated


def prune(
    model: Text[
        str, arg(help="a classifier of the zoo (see `jprune list`), or the folder of a language model")
    ] = "resnet20",
    data: Text[str, arg(help="digits, cifar10, cifar100 or imagenet-folder")] = "digits",
    data_dir: Text[str | None, arg(help="where the data lies (all but digits)")] = None,
    method: Text[str | None, arg(help="how the small network comes about; see `jprune list`")] = None,
    target: Text[float, arg(help="fraction to KEEP of --quantity")] = 0.5,
    quantity: Literal["macs", "params", "bytes"] = "macs",
    scope: Text[Literal["global", "uniform", "isomorphic"], arg(help="which units compete")] = "global",
    steps: Text[int, arg(help="prune in so many steps, fine-tuning after each")] = 1,
    schedule: Text[Literal["one_shot", "linear", "cubic"], arg(help="the way there, over --steps")] = "linear",
    multiple_of: Text[int, arg(help="kept widths are multiples of this (8 or 128 suit accelerators)")] = 1,
    min_keep: Text[int, arg(help="units every group keeps")] = 1,
    epochs: Text[int, arg(help="of the baseline, of each sparse phase, and of a network trained from scratch")] = 20,
    finetune_epochs: Text[int, arg(help="after pruning, over all steps")] = 15,
    learning_rate: float = 0.05,
    finetune_learning_rate: float = 0.02,
    batch_size: int = 64,
    weight_decay: float = 5e-4,
    strength: Text[float, arg(help="penalty of slimming and masksparsity; 0: what the schedule needs")] = 0.0,
    sparsity: Text[float, arg(help="folder: fraction of channels (and heads) to REMOVE")] = 0.3,
    calibration: Text[
        str | None, arg(help="folder: text file, or a folder of them, to look at and to recover on")
    ] = None,
    evaluation: Text[str | None, arg(help="folder: text to measure perplexity on; else a tenth is held back")] = None,
    sequences: Text[int, arg(help="folder: windows of calibration text")] = 128,
    length: Text[int, arg(help="folder: tokens of a window")] = 1024,
    recover: Text[int, arg(help="folder: steps of low-rank training")] = 0,
    rank: Text[int, arg(help="folder: mean rank of that training")] = 8,
    form: Text[Literal["auto", "uniform", "padded", "hetero"], arg(help="folder: how to write it")] = "auto",
    dtype: Text[
        Literal["float32", "bfloat16", "float16"] | None, arg(help="folder: to compute in, else as stored")
    ] = None,
    mesh: Text[tuple[int, int], arg(help="folder: devices for data and for the model")] = (1, 1),
    seed: int = 0,
    out: Text[Path | None, arg(help="folder for the results; by default named after the options")] = None,
    resume: Text[bool, arg(help="go on with the interrupted run in --out")] = False,
    quiet: Text[bool, arg(help="no progress bar, no table")] = False,
) -> int:
    """Train, prune, fine-tune, measure; leaves a pruned checkpoint and a report.

    With no options: ResNet-20 on scikit-learn's digits to half its multiply-accumulates, in a few minutes on a laptop.

        jprune prune --model vgg16_bn --data cifar10 --data-dir ~/cifar-10-batches-bin --method taylor --target 0.3

        jprune prune --method masksparsity --steps 1 --seed 3 --out runs/ms3

        jprune prune --method precrop --quantity params --target 0.2

    A language model (LLaMA, Mistral, Qwen2, Qwen3) is pruned in its Hugging Face folder, and leaves such a folder:

        jprune prune --model ./Llama-3.2-1B --method cfsp --sparsity 0.3 --calibration wiki.txt --recover 500
    """
    asked = dict(locals())
    if (Path(model) / "config.json").is_file():
        return _prune_folder(asked)
    _refuse(asked, LANGUAGE_ONLY, "means nothing to a classifier of the zoo: leave it out, or give a model's folder")
    from jprune.pipeline import Options, Run, rows

    method = method or "magnitude-l2"
    options = Options(
        model=model, data=data, data_dir=data_dir, method=method, target=target, quantity=quantity, scope=scope, steps=steps,
        schedule=schedule, multiple_of=multiple_of, min_keep=min_keep, epochs=epochs, finetune_epochs=finetune_epochs,
        learning_rate=learning_rate, finetune_learning_rate=finetune_learning_rate, batch_size=batch_size,
        weight_decay=weight_decay, strength=strength, seed=seed)  # fmt: skip
    out = out or Path("jprune-out") / f"{model}-{data}-{method}-{target:g}-seed{seed}"
    summary = _interruptible(Run(options, out, resume, quiet))
    if not quiet:
        from jprune.report.measure import Measured

        title = f"{model} on {data}, {method}, {quantity} to {summary['achieved_fraction']:.2%}"
        _show(title, rows(Measured(**summary["before"]), Measured(**summary["after"])))
        Console().print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    return 0


LANGUAGE_ONLY = (
    "sparsity",
    "calibration",
    "evaluation",
    "sequences",
    "length",
    "recover",
    "rank",
    "form",
    "dtype",
    "mesh",
)
ZOO_ONLY = ("data", "data_dir", "target", "quantity", "steps", "schedule", "min_keep", "epochs", "finetune_epochs",
            "finetune_learning_rate", "weight_decay", "strength")  # fmt: skip


def _refuse(asked: dict[str, Any], names: Iterable[str], why: str) -> None:
    """Raise ValueError for options that were given and mean nothing here."""
    defaults = {p.name: p.default for p in inspect.signature(prune).parameters.values()}
    for name in names:
        if asked[name] != defaults[name]:
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def _prune_folder(asked: dict[str, Any]) -> int:
    """`prune` for the folder of a language model."""
    from jprune.pipeline.language import LanguageRun, rows
    from jprune.pipeline.language_options import LanguageOptions

    _refuse(asked, ZOO_ONLY, "means nothing to a language model's folder: leave it out")
    own = {f.name: f.default for f in dataclasses.fields(LanguageOptions) if f.name in asked}
    given = {name: asked[name] for name in own}
    for name in ("method", "batch_size", "learning_rate"):  # where the zoo has another default
        if asked[name] == inspect.signature(prune).parameters[name].default:
            given[name] = own[name]
    if given["scope"] == "isomorphic":
        raise ValueError("scope is 'isomorphic': it must be global or uniform")
    options = LanguageOptions(**given)
    name = Path(options.model).resolve().name
    out = asked["out"] or Path("jprune-out") / f"{name}-{options.method}-{options.sparsity:g}-seed{options.seed}"
    summary = _interruptible(LanguageRun(options, out, asked["resume"], asked["quiet"]))
    if not asked["quiet"]:
        from jprune.pipeline.language import MeasuredDecoder

        removed = summary["removed"]
        title = f"{name}, {options.method}: {removed['parameters']:.1%} of the parameters removed"
        _show(title, rows(MeasuredDecoder(**summary["before"]), MeasuredDecoder(**summary["after"])))
        Console().print(f"model: {out / 'model'} ({summary['form']})\nreport: {out / 'report.html'}", highlight=False,
                        soft_wrap=True)  # fmt: skip
    return 0


def _interruptible(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run it; Ctrl-C says how to go on."""
    try:
        return run()
    except KeyboardInterrupt:
        command = " ".join(a for a in sys.argv[1:] if a != "--resume")
        print(f"interrupted; go on with: jprune {command} --resume", file=sys.stderr, flush=True)
        os._exit(130)  # compilers and writers in the background do not survive the interpreter's orderly end


def _show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table whose first row is the header."""
    head, *body = rows
    table = Table(title=title)
    for i, column in enumerate(head):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in body:
        table.add_row(*row)
    Console().print(table)


def evaluate(
    model: Text[str, arg(help="folder of a vision transformer: timm's, transformers', torchvision's, AugReg's .npz")],
    data: Text[str, arg(help="folder of pictures, or of one folder of pictures a class")],
    tokens: Text[str, arg(help="how tokens are reduced; see `jprune list`")] = "zero_tprune",
    flops: Text[float, arg(help="share of the blocks' multiply-adds to KEEP")] = 0.65,
    batch_size: int = 32,
    images: Text[int, arg(help="at most so many pictures, drawn by --seed; 0: all")] = 0,
    search: Text[int, arg(help="zero_tprune: try so many schedules on a part of the pictures first")] = 0,
    search_images: Text[int, arg(help="pictures to try them on, at most half of all")] = 512,
    pictures: Text[int, arg(help="so many of them are drawn with the patches that are left")] = 6,
    heads: Text[int | None, arg(help="attention heads, where the files do not say")] = None,
    dtype: Text[Literal["float32", "bfloat16", "float16"] | None, arg(help="to compute in, else as stored")] = None,
    seed: int = 0,
    out: Text[Path | None, arg(help="folder for the results; by default named after the options")] = None,
    quiet: Text[bool, arg(help="no progress bar, no table")] = False,
) -> int:
    """Run a trained vision transformer on fewer tokens: accuracy, multiply-adds and speed, before and after.

    Nothing is trained. Leaves a report with pictures of the patches that each block still had.

        jprune eval --model deit_small --data imagenet/val --tokens zero_tprune --flops 0.65
    """
    from jprune.pipeline.tokens import TokenOptions, evaluate_tokens, rows

    options = TokenOptions(
        model, data, tokens, flops, batch_size, images, search, search_images, pictures, heads, dtype, seed
    )
    name = Path(model).resolve().name
    out = out or Path("jprune-out") / f"{name}-{tokens}-{flops:g}"
    summary = evaluate_tokens(options, out, quiet)
    if not quiet:
        _show(f"{name}, {tokens}, {summary['images']} pictures", rows(summary))
        if summary["note"]:
            print(summary["note"])
        Console().print(f"report: {out / 'report.html'}\npatches: {out / 'kept.png'}", highlight=False, soft_wrap=True)
    return 0


def chat(
    model: Text[str, arg(help="folder of a LLaVA-1.5, with tokenizer.json")],
    image: Text[str, arg(help="file of a picture")],
    question: str = "What is in this picture?",
    tokens: Text[str, arg(help="which visual tokens stay; see `jprune list`")] = "divprune",
    keep: Text[int | None, arg(help="how many stay; else the share --ratio")] = None,
    ratio: float = 0.098,
    layer: Text[
        int, arg(help="drop them behind so many layers of the decoder (fastv, vtw, divprune); 0: before it")
    ] = 0,
    order: Literal["raster", "selection"] = "raster",
    positions: Literal["packed", "original"] = "packed",
    vision: Text[str | None, arg(help="folder of CLIP, for weights without a vision tower")] = None,
    steps: Text[int, arg(help="most tokens of an answer")] = 64,
    dtype: Text[Literal["float32", "bfloat16", "float16"] | None, arg(help="to compute in, else as stored")] = None,
    seed: int = 0,
    out: Text[Path | None, arg(help="folder for the results; by default named after the options")] = None,
) -> int:
    """Ask a LLaVA about a picture, with all visual tokens and with few of them.

    Leaves both answers, their times, and the picture with the visual tokens that were kept drawn over it.

        jprune chat --model llava-1.5-7b-hf --image cat.jpg --question "What is the cat doing?" --keep 56
    """
    from jprune.pipeline.chat import ChatOptions, rows
    from jprune.pipeline.chat import chat as ask

    options = ChatOptions(
        model, image, question, tokens, keep, ratio, layer, order, positions, vision, steps, dtype, seed
    )
    out = out or Path("jprune-out") / f"{Path(model).resolve().name}-{Path(image).stem}-{tokens}"
    summary = ask(options, out)
    console = Console()
    for name in ("all", "reduced"):
        console.print(f"[bold]{name}:[/] ", end="")
        console.print(summary["answers"][name], markup=False, highlight=False, soft_wrap=True)
    _show(f"{Path(model).resolve().name}, {tokens}", rows(summary))
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
    return 0


def explain(
    model: Positional[str],
    path: Text[str | None, arg(help="only this leaf, such as params/stem_conv/kernel")] = None,
    axis: Text[int | None, arg(help="only this axis of the leaf")] = None,
    num_classes: int | None = None,
    image: Text[tuple[int, int, int] | None, arg(help="height width channels; by default the model's own")] = None,
    costs: Text[bool, arg(help="also the cost of every layer")] = True,
) -> int:
    """The dependency groups of a zoo model: what has to be cut together, what cannot be cut and why.

    jprune explain resnet20

    jprune explain vit_small --path params/block1_attn/qkv/kernel
    """
    import jax
    import jax.numpy as jnp

    from jprune.graph import trace
    from jprune.models import MODELS, build

    module = build(model, num_classes)
    x = jax.ShapeDtypeStruct((2, *(image or MODELS[model].image)), jnp.float32)
    graph = trace(module.apply, jax.eval_shape(module.init, jax.random.key(0), x), x)
    print(graph.explain(path, axis))
    if costs and path is None:
        Console(width=None if sys.stdout.isatty() else 120).print(graph.cost_table())
    return 0


def list_() -> int:
    """Models, data sets, methods, scopes and schedules."""
    from jprune.methods import METHODS
    from jprune.models import MODELS
    from jprune.models.llava_answer import ABOUT as VISUAL
    from jprune.pipeline import DATA
    from jprune.pipeline.language_methods import LANGUAGE_METHODS
    from jprune.tokens.methods import ABOUT as TOKENS

    console = Console(width=None if sys.stdout.isatty() else 120)
    scopes = {"global": "all units in one ranking", "uniform": "the same fraction of every group",
              "isomorphic": "groups that are used alike compete"}  # fmt: skip
    schedules = {"one_shot": "all at once", "linear": "equal steps", "cubic": "large steps first"}
    for title, entries in (
        ("models", {n: f"{e.about}, made for {'x'.join(map(str, e.image))}" for n, e in MODELS.items()}),
        ("data", DATA),
        ("methods", {n: m.about for n, m in METHODS.items()}),
        ("methods for the folder of a language model", {n: m.about for n, m in LANGUAGE_METHODS.items()}),
        ("tokens of a vision transformer (jprune eval)", TOKENS),
        ("visual tokens of a LLaVA (jprune chat)", VISUAL),
        ("scopes", scopes),
        ("schedules", schedules),
    ):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 3, 0, 0))
        for name, about in entries.items():
            table.add_row(f"[bold]{name}[/]", about)
        console.print(table)
        console.print()
    return 0


def main() -> None:
    """Entry point: errors that a user can mend are one line and exit status 2."""
    commands = {"prune": prune, "eval": evaluate, "chat": chat, "explain": explain, "list": list_}
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            commands, prog="jprune", description="Prune any JAX model: trace once, score, allocate, compact."
        )
    except (ValueError, OSError) as error:
        if os.environ.get("JPRUNE_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True, markup=True)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
