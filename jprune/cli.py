"""The command line: `jprune prune`, `jprune eval`, `jprune chat`, `jprune explain`, `jprune list`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from jprune.files.atomic import ignore_closed_loops
from jprune.interrupt import obey_ctrl_c, stop

Text = Annotated


def _option(name: str, metavar: str, about: str = "") -> Any:
    """An option that is not given as long as it is None; the help says what each kind of model then does."""
    return arg(help=about, metavar=metavar, help_behavior_hint=lambda _: _defaults(name))


def prune(
    model: Text[
        str, arg(help="a classifier of the zoo (see `jprune list`), or the folder of a language model")
    ] = "resnet20",
    data: Text[str | None, _option("data", "STR", "digits, cifar10, cifar100 or imagenet-folder")] = None,
    data_dir: Text[str | None, _option("data_dir", "DIR", "where the data lies (all but digits)")] = None,
    method: Text[str | None, _option("method", "STR", "how the small network comes about; see `jprune list`")] = None,
    target: Text[float | None, _option("target", "FLOAT", "fraction to KEEP of --quantity")] = None,
    quantity: Text[
        Literal["macs", "params", "bytes"] | None, _option("quantity", "{macs,params,bytes}", "what --target counts")
    ] = None,
    scope: Text[
        Literal["global", "uniform", "isomorphic"] | None,
        _option("scope", "{global,uniform,isomorphic}", "which units compete (language models: not isomorphic)"),
    ] = None,
    steps: Text[int | None, _option("steps", "INT", "prune in so many steps, fine-tuning after each")] = None,
    schedule: Text[
        Literal["one_shot", "linear", "cubic"] | None,
        _option("schedule", "{one_shot,linear,cubic}", "the way there, over --steps"),
    ] = None,
    multiple_of: Text[
        int | None, _option("multiple_of", "INT", "kept widths are multiples of this (8 or 128 suit accelerators)")
    ] = None,
    min_keep: Text[int | None, _option("min_keep", "INT", "units every group keeps")] = None,
    epochs: Text[
        int | None,
        _option("epochs", "INT", "of the baseline, of each sparse phase, and of a network trained from scratch"),
    ] = None,
    finetune_epochs: Text[int | None, _option("finetune_epochs", "INT", "after pruning, over all steps")] = None,
    learning_rate: Text[float | None, _option("learning_rate", "FLOAT", "of training, or of --recover")] = None,
    finetune_learning_rate: Text[float | None, _option("finetune_learning_rate", "FLOAT", "after pruning")] = None,
    batch_size: Text[int | None, _option("batch_size", "INT", "images, or windows of text, at a time")] = None,
    weight_decay: Text[float | None, _option("weight_decay", "FLOAT", "of all training")] = None,
    strength: Text[
        float | None,
        _option("strength", "FLOAT", "penalty of slimming and masksparsity; 0: what the schedule needs"),
    ] = None,
    threshold: Text[
        float | None, _option("threshold", "FLOAT", "masksparsity: channels whose scales end at or below it go")
    ] = None,
    sparsity: Text[
        float | None,
        _option("sparsity", "FLOAT", "fraction of channels (and heads) to REMOVE; masksparsity: of its mask"),
    ] = None,
    calibration: Text[
        str | None, _option("calibration", "PATH", "text file, or a folder of them, to look at and to recover on")
    ] = None,
    evaluation: Text[
        str | None, _option("evaluation", "PATH", "text to measure perplexity on; else a tenth is held back")
    ] = None,
    text_key: Text[
        str | None, _option("text_key", "STR", "entry of a .jsonl line that holds its text, or its chat messages")
    ] = None,
    sequences: Text[int | None, _option("sequences", "INT", "windows of calibration text")] = None,
    length: Text[int | None, _option("length", "INT", "tokens of a window")] = None,
    recover: Text[int | None, _option("recover", "INT", "steps of low-rank training")] = None,
    rank: Text[int | None, _option("rank", "INT", "mean rank of that training")] = None,
    form: Text[
        Literal["auto", "uniform", "padded", "hetero"] | None,
        _option("form", "{auto,uniform,padded,hetero}", "how the folder is written"),
    ] = None,
    dtype: Text[
        Literal["float32", "bfloat16", "float16"] | None,
        _option("dtype", "{float32,bfloat16,float16}", "to compute in, else as stored"),
    ] = None,
    mesh: Text[tuple[int, int] | None, _option("mesh", "INT INT", "devices for data and for the model")] = None,
    seed: int = 0,
    out: Text[Path | None, arg(help="folder for the results; by default named after the options")] = None,
    resume: Text[bool, arg(help="go on with the interrupted run in --out")] = False,
    quiet: Text[bool, arg(help="no progress, no table")] = False,
) -> int:
    """Train, prune, fine-tune, measure; leaves a pruned checkpoint and a report.

    With no options: ResNet-20 on scikit-learn's digits to half its multiply-accumulates, in a few minutes on a laptop.

        jprune prune --model vgg16_bn --data cifar10 --data-dir ~/cifar-10-batches-bin --method taylor --target 0.3

        jprune prune --method masksparsity --seed 3 --out runs/ms3

        jprune prune --method precrop --quantity params --target 0.2

    A language model (LLaMA, Mistral, Qwen2, Qwen3) is pruned in its Hugging Face folder, and leaves such a folder:

        jprune prune --model ./Llama-3.2-1B --method cfsp --sparsity 0.3 --calibration wiki.txt --recover 500
    """
    given = {k: v for k, v in locals().items() if v is not None and k not in ("out", "resume", "quiet")}
    from jprune.jobs.which_model import is_language_model

    if is_language_model(model):
        return _prune_folder(given, out, resume, quiet)
    from jprune.jobs import Options, Run, rows

    options = _made(
        Options, given, f"{model!r} is a classifier of the zoo: leave it out, or give the folder of a language model"
    )
    if out is None:
        amount = [options.target, options.sparsity or options.threshold][options.method == "masksparsity"]
        out = Path("jprune-out") / f"{model}-{options.data}-{options.method}-{amount:g}-seed{seed}"
    summary = _interruptible(lambda: Run(options, out, resume, quiet), resumable=True)
    if not quiet:
        from jprune.report.measure import Measured

        title = f"{model} on {options.data}, {options.method}, {options.quantity} to {summary['achieved_fraction']:.2%}"
        _show(title, rows(Measured(**summary["before"]), Measured(**summary["after"])))
        _say(f"report: {out / 'report.html'}")
    return 0


def _made(options: type, given: dict[str, Any], otherwise: str) -> Any:
    """The options of one kind of model, from those that were given; one that it does not have is refused."""
    known = {f.name for f in dataclasses.fields(options)}
    for name in given:
        if name not in known:
            raise ValueError(f"--{name.replace('_', '-')} means nothing here: {otherwise}")
    return options(**given)


def _defaults(name: str) -> str:
    """What the help says of an option that is not given: the default of every kind of model that has it."""
    from jprune.jobs.classifier_options import Options
    from jprune.jobs.decoder_options import LanguageOptions

    found = {
        kind: f.default
        for kind, options in (("classifiers", Options), ("language models", LanguageOptions))
        for f in dataclasses.fields(options)
        if f.name == name
    }
    one = len(set(map(str, found.values()))) == 1
    said = {kind: "optional" if v is None else f"default: {v}" for kind, v in found.items()}
    if len(found) == 1:
        return "({}; {} only)".format(*next((v, k) for k, v in said.items()))
    return f"({said['classifiers']})" if one else "({classifiers}; language models: {})".format(
        said["language models"].removeprefix("default: "), **said)  # fmt: skip


def _prune_folder(given: dict[str, Any], out: Path | None, resume: bool, quiet: bool) -> int:
    """`prune` for the folder of a language model."""
    from jprune.jobs.decoder import LanguageRun, MeasuredDecoder, rows
    from jprune.jobs.decoder_options import LanguageOptions

    options = _made(LanguageOptions, given, f"{given['model']} is the folder of a language model: leave it out")
    name = Path(options.model).resolve().name
    if out is None:
        out = Path("jprune-out") / f"{name}-{options.method}-{options.sparsity:g}-seed{options.seed}"
    summary = _interruptible(lambda: LanguageRun(options, out, resume, quiet), resumable=True)
    if not quiet:
        removed = summary["removed"]
        title = f"{name}, {options.method}: {removed['parameters']:.1%} of the parameters removed"
        _show(title, rows(MeasuredDecoder(**summary["before"]), MeasuredDecoder(**summary["after"])))
        _say(f"model: {out / 'model'} ({summary['form']})\nreport: {out / 'report.html'}")
    return 0


def _interruptible(prepare: Callable[[], Callable[[], dict[str, Any]]], resumable: bool = False) -> dict[str, Any]:
    """Get ready, then run; Ctrl-C ends it with one line, which says how to go on where that can be."""
    run = prepare()  # until here nothing is lost, and Ctrl-C calls `stop`
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run()
    except KeyboardInterrupt:
        command = shlex.join(a for a in sys.argv[1:] if a != "--resume")
        end = f"; go on with: jprune {command} --resume" if resumable else ""
        print(f"interrupted{end}", file=sys.stderr, flush=True)
        os._exit(130)  # compilers and writers in the background do not survive the interpreter's orderly end


def _show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table whose first row is the header."""
    head, *body = rows
    table = Table(title=escape(title))
    for i, column in enumerate(head):
        table.add_column(escape(column), justify="left" if i == 0 else "right")
    for row in body:
        table.add_row(*map(escape, row))
    Console().print(table)


def _say(text: str) -> None:
    """Lines as they are."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


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
    quiet: Text[bool, arg(help="no progress, no table")] = False,
) -> int:
    """Run a trained vision transformer on fewer tokens: accuracy, multiply-adds and speed, before and after.

    Nothing is trained. Leaves a report with pictures of the patches that each block still had.

        jprune eval --model deit_small --data imagenet/val --tokens zero_tprune --flops 0.65
    """
    from jprune.jobs.vision import TokenOptions, evaluate_tokens, rows

    options = TokenOptions(
        model, data, tokens, flops, batch_size, images, search, search_images, pictures, heads, dtype, seed
    )
    name = Path(model).resolve().name
    out = out or Path("jprune-out") / f"{name}-{tokens}-{flops:g}"
    summary = _interruptible(lambda: lambda: evaluate_tokens(options, out, quiet))
    if not quiet:
        _show(f"{name}, {tokens}, {summary['images']} pictures", rows(summary))
        if summary["note"]:
            print(summary["note"])
        _say(f"report: {out / 'report.html'}\npatches: {out / 'kept.png'}")
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
    quiet: Text[bool, arg(help="no progress")] = False,
) -> int:
    """Ask a LLaVA about a picture, with all visual tokens and with few of them.

    Leaves both answers, their times, and the picture with the visual tokens that were kept drawn over it.

        jprune chat --model llava-1.5-7b-hf --image cat.jpg --question "What is the cat doing?" --keep 56
    """
    from jprune.jobs.llava import ChatOptions, rows
    from jprune.jobs.llava import chat as ask

    options = ChatOptions(
        model, image, question, tokens, keep, ratio, layer, order, positions, vision, steps, dtype, seed
    )
    out = out or Path("jprune-out") / f"{Path(model).resolve().name}-{Path(image).stem}-{tokens}"
    summary = _interruptible(lambda: lambda: ask(options, out, quiet=quiet))
    for name in ("all", "reduced"):
        _say(f"{name}: {summary['answers'][name]}")
    _show(f"{Path(model).resolve().name}, {tokens}", rows(summary))
    _say(f"written to {out}")
    return 0


def explain(
    model: Positional[str],
    path: Text[str | None, arg(help="only this leaf, such as params/stem_conv/kernel")] = None,
    axis: Text[int | None, arg(help="only this axis of the leaf")] = None,
    num_classes: int | None = None,
    image: Text[tuple[int, int, int] | None, arg(help="height width channels; by default the model's own")] = None,
    length: Text[int, arg(help="language models: tokens of a window, which the costs are of")] = 1024,
    costs: Text[bool, arg(help="also the cost of every layer")] = True,
) -> int:
    """The dependency groups of a zoo model, or of a model in a folder: what is cut together, what cannot be cut and why.

    jprune explain resnet20

    jprune explain vit_small --path params/block1_attn/qkv/kernel

    jprune explain ./Llama-3.2-1B
    """
    from jprune.graph import trace
    from jprune.jobs.which_model import to_explain

    graph = trace(*to_explain(model, num_classes, image, length))
    print(graph.explain(path, axis))
    if costs and path is None:
        Console(width=None if sys.stdout.isatty() else 120).print(graph.cost_table())
    return 0


def list_() -> int:
    """Models, data sets, methods, scopes and schedules."""
    from jprune.jobs import DATA
    from jprune.methods.channels.decoder_names import LANGUAGE_METHODS
    from jprune.methods.channels.names import METHODS
    from jprune.methods.tokens.llava_answer import ABOUT as VISUAL
    from jprune.methods.tokens.reducers_by_name import ABOUT as TOKENS
    from jprune.models import MODELS

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
            table.add_row(f"[bold]{escape(name)}[/]", escape(about))
        console.print(table)
        console.print()
    return 0


def main() -> None:
    """Entry point: errors that a user can mend are one line and exit status 2."""
    obey_ctrl_c()
    ignore_closed_loops()
    commands = {"prune": prune, "eval": evaluate, "chat": chat, "explain": explain, "list": list_}
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            commands, prog="jprune", description="Prune any JAX model: trace once, score, allocate, compact."
        )
    except (ValueError, OSError) as error:
        if os.environ.get("JPRUNE_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        status = 2
    sys.exit(status)
