"""The command line: `jprune prune`, `eval`, `generate`, `chat`, `explain`, `list`; its flags are those of the jobs' configs."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from jprune import flags
from jprune.files.atomic import ignore_leftovers
from jprune.interrupt import obey_ctrl_c, stop

Text = Annotated


@dataclasses.dataclass(frozen=True)
class Common:
    """What commands share that leave a folder.

    Attributes:
      out: folder for the results; by default named after the options
      quiet: no progress, no table
    """

    out: Path | None = None
    quiet: bool = False


@dataclasses.dataclass(frozen=True)
class Resumable(Common):
    """And those that can be gone on with.

    Attributes:
      resume: go on with the interrupted run in --out
    """

    resume: bool = False


# -- prune -----------------------------------------------------------------------------------------------------------

PRUNE = """Train, prune, fine-tune, measure; leaves a pruned checkpoint and a report.

With no options: ResNet-20 on scikit-learn's digits to half its MACs, in a few minutes on a laptop.

    jprune prune --model vgg16_bn --data cifar10 --data-dir ~/cifar-10-batches-bin --method taylor --sparsity 0.7

    jprune prune --quantity latency --keep 0.6

    jprune prune --method precrop --quantity params --keep 0.2 --seed 3 --out runs/p3

A language model (LLaMA, Mistral, Qwen2, Qwen3) is pruned in its Hugging Face folder, and leaves such a folder:

    jprune prune --model ./Llama-3.2-1B --method cfsp --sparsity 0.3 --calibration wiki.txt --recover 500

Single weights instead of channels, anywhere or two of every four:

    jprune prune --model ./Llama-3.2-1B --method sparsegpt --pattern 2:4 --calibration wiki.txt

    jprune prune --method icbs --sparsity 0.9
"""


def _prune_flags() -> type:
    from jprune.jobs import ClassifierConfig, DecoderConfig
    from jprune.methods.names import METHODS

    parts: dict[str, type] = {}
    names: dict[type, dict[str, None]] = {}
    for methods in METHODS.values():
        for m in methods.values():
            names.setdefault(m.config, {})[m.name] = None  # a method of two kinds of model is named once
    for config, those in names.items():
        parts[", ".join(those)] = config
    kinds = {"classifiers": ClassifierConfig, "language models": DecoderConfig}
    return flags.union("prune", PRUNE, kinds, Resumable, parts)


def prune(asked: Any) -> int:
    """Run the job that the flags of `jprune prune` describe."""
    from jprune.jobs import ClassifierConfig, ClassifierRun, DecoderConfig, DecoderRun
    from jprune.jobs.which_model import is_language_model

    given = flags.given(asked, Resumable)
    model = given.get("model", ClassifierConfig.model)
    folder = is_language_model(model)
    kind = "decoders" if folder else "classifiers"
    if folder:
        options, settings = _made(
            DecoderConfig, kind, given, f"{model} is the folder of a language model: leave it out"
        )
        name = Path(model).resolve().name
    else:
        hint = f"{model!r} is a classifier of the zoo: leave it out, or give the folder of a language model"
        options, settings = _made(ClassifierConfig, kind, given, hint)
        name = f"{model}-{options.data}"
    amount = "" if options.amount is None else f"-{options.amount.quantity}{options.amount.keep:g}"
    out = asked.out or Path("jprune-out") / f"{name}-{options.method}{amount}-seed{options.seed}"
    run = DecoderRun if folder else ClassifierRun
    summary = _interruptible(lambda: run(options, out, settings, asked.resume, asked.quiet), resumable=True)
    if not asked.quiet:
        _show_pruned(folder, name, options, out, summary)
    return 0


def _show_pruned(folder: bool, name: str, options: Any, out: Path, summary: Mapping[str, Any]) -> None:
    if folder:
        from jprune.jobs.decoder import MeasuredDecoder, rows

        gone = f"{summary['removed']['parameters']:.1%} of the parameters removed"
        if "weights" in summary["kept"]:
            gone = f"{1 - summary['kept']['weights']:.1%} of {summary['weights']['of']:,} weights are zero"
        title = f"{name}, {options.method}: {gone}"
        _show(title, rows(*(MeasuredDecoder(**summary[side]) for side in ("before", "after"))))
        _say(f"model: {out / 'model'} ({summary['form']})\nreport: {out / 'report.html'}")
        return
    from jprune.jobs.classifier import rows as both
    from jprune.report.measure import Measured

    quantity = summary["quantity"]
    title = f"{options.model} on {options.data}, {options.method}, {quantity} to {summary['kept'][quantity]:.2%}"
    _show(title, both(*(Measured(**summary[side]) for side in ("before", "after"))))
    _say(f"report: {out / 'report.html'}")


def _made(config: type, kind: str, given: Mapping[str, Any], otherwise: str) -> tuple[Any, Any]:
    """(the job's options, the method's settings) of the flags that were given; those of others are refused.

    Args:
      config: of the job.
      kind: of model.
      given: {name: value}.
      otherwise: what to say of a flag that belongs to another kind of model.
    """
    from jprune.methods.names import METHODS, method

    known = {f.name: f.default for f in dataclasses.fields(config)}
    chosen = method(given.get("method", known["method"]), kind)
    own = {f.name for f in dataclasses.fields(chosen.config)}
    for name in given:
        if name in known or name in own:
            continue
        flag = f"--{name.replace('_', '-')}"
        having = [m.name for m in METHODS[kind].values() if name in {f.name for f in dataclasses.fields(m.config)}]
        if having:
            raise ValueError(f"{flag} means nothing to the method {chosen.name!r}: leave it out, or choose one that has it "
                             f"({', '.join(having)})")  # fmt: skip
        raise ValueError(f"{flag} means nothing here: {otherwise}")
    options = config(**{k: v for k, v in given.items() if k in known})
    return options, chosen.config(**{k: v for k, v in given.items() if k in own})


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


# -- eval, generate, chat --------------------------------------------------------------------------------------------

EVAL = """Measure a model's folder.

A vision transformer runs on fewer tokens: accuracy, MACs and speed, before and after. Nothing is trained; the report has
pictures of the patches that each block still had.

    jprune eval --model deit_small --data imagenet/val --tokens zero_tprune --keep 0.65

A language model reads text: perplexity, tokens a second, memory.

    jprune eval --model ./Llama-3.2-1B --evaluation wiki.txt
"""


def _eval_flags() -> type:
    from jprune.jobs.perplexity import PerplexityConfig
    from jprune.jobs.vision import VisionEvalConfig

    return flags.union(
        "eval", EVAL, {"vision transformers": VisionEvalConfig, "language models": PerplexityConfig}, Common
    )


def evaluate(asked: Any) -> int:
    """Run the measurement that the flags of `jprune eval` describe."""
    from jprune.jobs import perplexity, vision
    from jprune.jobs.which_model import is_decoder_folder

    given = flags.given(asked, Common)
    if "model" not in given:
        raise ValueError("--model is missing: give the folder of a vision transformer, or of a language model")
    if not Path(given["model"]).exists():
        raise ValueError(
            f"there is no folder {given['model']}: give that of a vision transformer, or of a language model"
        )
    decoder = is_decoder_folder(given["model"])
    config = perplexity.PerplexityConfig if decoder else vision.VisionEvalConfig
    known = {f.name for f in dataclasses.fields(config)}
    for flag in given:
        if flag not in known:
            what = "language model" if decoder else "vision transformer"
            raise ValueError(
                f"--{flag.replace('_', '-')} means nothing here: {given['model']} is a {what}: leave it out"
            )
    needed = "evaluation" if decoder else "data"
    if needed not in given:
        what = "text to measure on" if decoder else "folder of pictures"
        raise ValueError(f"--{needed} is missing: give the {what}")
    name = Path(given["model"]).resolve().name
    options: Any = config(**given)
    if decoder:
        out = asked.out or Path("jprune-out") / f"{name}-eval"
        summary = _interruptible(lambda: lambda: perplexity.evaluate_text(options, out, asked.quiet))
        if not asked.quiet:
            _show(f"{name}, {summary['windows']} windows", perplexity.rows(summary))
            _say(f"report: {out / 'report.html'}")
        return 0
    out = asked.out or Path("jprune-out") / f"{name}-{options.tokens}-{options.share:g}"
    summary = _interruptible(lambda: lambda: vision.evaluate_tokens(options, out, asked.quiet))
    if not asked.quiet:
        _show(f"{name}, {options.tokens}, {summary['images']} pictures", vision.rows(summary))
        if summary["note"]:
            print(summary["note"])
        _say(f"report: {out / 'report.html'}\npatches: {out / 'kept.png'}")
    return 0


GENERATE = """Have a language model's folder continue a prompt: the quick look at what a pruned model still says.

    jprune generate --model small/model --prompt "The capital of France is"
"""


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No flags of its own."""


def _generate_flags() -> type:
    from jprune.jobs.generate import GenerateConfig

    return flags.union("generate", GENERATE, {"": GenerateConfig}, Nothing)


def generate(asked: Any) -> int:
    """Print the answer."""
    from jprune.jobs.generate import GenerateConfig, continue_prompt

    options = _required(GenerateConfig, flags.given(asked, Nothing))
    found = _interruptible(lambda: lambda: continue_prompt(options))
    _say(found["text"])
    print(f"{found['tokens']} tokens, {found['tokens_per_second']:.1f} a second", file=sys.stderr)
    return 0


def _required(config: type, given: Mapping[str, Any]) -> Any:
    """The config; ValueError that names a flag that has to be given."""
    for f in dataclasses.fields(config):
        if f.default is dataclasses.MISSING and f.name not in given:
            raise ValueError(f"--{f.name.replace('_', '-')} is missing: {flags.about(config)[f.name]}")
    return config(**given)


CHAT = """Ask a LLaVA about a picture, with all visual tokens and with few of them.

Leaves both answers, their times, and the picture with the visual tokens that were kept drawn over it.

    jprune chat --model llava-1.5-7b-hf --image cat.jpg --question "What is the cat doing?" --count 56
"""


def _chat_flags() -> type:
    from jprune.jobs.llava import ChatConfig

    return flags.union("chat", CHAT, {"": ChatConfig}, Common)


def chat(asked: Any) -> int:
    """Answer, print and write both answers."""
    from jprune.jobs import llava

    o = _required(llava.ChatConfig, flags.given(asked, Common))
    name = Path(o.model).resolve().name
    out = asked.out or Path("jprune-out") / f"{name}-{Path(o.image).stem}-{o.tokens}"
    summary = _interruptible(lambda: lambda: llava.chat(o, out, quiet=asked.quiet))
    for side in ("all", "reduced"):
        _say(f"{side}: {summary['answers'][side]}")
    if not asked.quiet:
        _show(f"{name}, {o.tokens}", llava.rows(summary))
        _say(f"written to {out}")
    return 0


# -- explain, list ---------------------------------------------------------------------------------------------------


def explain(
    model: Positional[str],
    path: Text[str | None, arg(help="only this leaf, such as params/stem_conv/kernel")] = None,
    axis: Text[int | None, arg(help="only this axis of the leaf")] = None,
    num_classes: int | None = None,
    image: Text[tuple[int, int, int] | None, arg(help="height width channels; by default the model's own")] = None,
    length: Text[
        int | None, arg(help="language models: tokens of a window, which the costs are of; 1024 by default")
    ] = None,
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
    """Models, data sets, and all methods by the kind of model that they are for."""
    from jprune.jobs.classifier import DATA
    from jprune.methods.names import TABLE
    from jprune.models import MODELS

    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, entries in (
        ("models", {n: f"{e.about}, made for {'x'.join(map(str, e.image))}" for n, e in MODELS.items()}),
        ("data", DATA),
        *TABLE.items(),
    ):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 3, 0, 0))
        for name, about in entries.items():
            table.add_row(f"[bold]{escape(name)}[/]", escape(about))
        console.print(table)
        console.print()
    return 0


# -- the program -----------------------------------------------------------------------------------------------------

MADE: dict[str, tuple[Callable[[], type], Callable[[Any], int]]] = {
    "prune": (_prune_flags, prune),
    "eval": (_eval_flags, evaluate),
    "generate": (_generate_flags, generate),
    "chat": (_chat_flags, chat),
}
ABOUT = {"prune": PRUNE, "eval": EVAL, "generate": GENERATE, "chat": CHAT}


def _commands(asked: str) -> dict[str, Callable[..., Any]]:
    """What there is to run; only the command that is asked for imports what its flags are made of."""
    out: dict[str, Callable[..., Any]] = {}
    for name, (made, _) in MADE.items():
        if name == asked:
            out[name] = made()
        else:
            out[name] = dataclasses.make_dataclass(name, [])
            out[name].__doc__ = ABOUT[name].split("\n\n")[0]
    return {**out, "explain": explain, "list": list_}


def main() -> None:
    """Entry point: errors that a user can mend are one line and exit status 2."""
    obey_ctrl_c()
    ignore_leftovers()
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            _commands(asked), prog="jprune", description="Prune any JAX model: trace once, score, allocate, compact."
        )
        if asked in MADE:
            status = MADE[asked][1](status)
    except (ValueError, OSError) as error:
        if os.environ.get("JPRUNE_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        status = 2
    sys.exit(status)
