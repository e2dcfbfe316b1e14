"""The command line: `jprune prune`, `jprune explain`, `jprune list`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

Text = Annotated


def prune(
    model: Text[str, arg(help="a classifier of the zoo; see `jprune list`")] = "resnet20",
    data: Text[str, arg(help="digits, cifar10, cifar100 or imagenet-folder")] = "digits",
    data_dir: Text[str | None, arg(help="where the data lies (all but digits)")] = None,
    method: Text[str, arg(help="how the small network comes about; see `jprune list`")] = "magnitude-l2",
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
    """
    from jprune.pipeline import Options, Run, rows

    options = Options(
        model=model, data=data, data_dir=data_dir, method=method, target=target, quantity=quantity, scope=scope, steps=steps,
        schedule=schedule, multiple_of=multiple_of, min_keep=min_keep, epochs=epochs, finetune_epochs=finetune_epochs,
        learning_rate=learning_rate, finetune_learning_rate=finetune_learning_rate, batch_size=batch_size,
        weight_decay=weight_decay, strength=strength, seed=seed)  # fmt: skip
    out = out or Path("jprune-out") / f"{model}-{data}-{method}-{target:g}-seed{seed}"
    run = Run(options, out, resume, quiet)
    try:
        summary = run()
    except KeyboardInterrupt:
        command = " ".join(a for a in sys.argv[1:] if a != "--resume")
        print(f"interrupted; go on with: jprune {command} --resume", file=sys.stderr, flush=True)
        os._exit(130)  # compilers and writers in the background do not survive the interpreter's orderly end
    if not quiet:
        from jprune.report.measure import Measured

        console = Console()
        head, *body = rows(Measured(**summary["before"]), Measured(**summary["after"]))
        table = Table(title=f"{model} on {data}, {method}, {quantity} to {summary['achieved_fraction']:.2%}")
        for i, column in enumerate(head):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in body:
            table.add_row(*row)
        console.print(table)
        console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
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
    from jprune.pipeline import DATA

    console = Console(width=None if sys.stdout.isatty() else 120)
    scopes = {"global": "all units in one ranking", "uniform": "the same fraction of every group",
              "isomorphic": "groups that are used alike compete"}  # fmt: skip
    schedules = {"one_shot": "all at once", "linear": "equal steps", "cubic": "large steps first"}
    for title, entries in (
        ("models", {n: f"{e.about}, made for {'x'.join(map(str, e.image))}" for n, e in MODELS.items()}),
        ("data", DATA),
        ("methods", {n: m.about for n, m in METHODS.items()}),
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
    commands = {"prune": prune, "explain": explain, "list": list_}
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
