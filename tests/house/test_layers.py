"""The house stands: every import runs downward, no circle, every folder says what it is, and the public names are lazy."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

import jprune

ROOT = Path(__file__).parents[2]

# From the ground up. What stands in one line may not import each other; a folder stands where its name does.
LAYERS = [
    ["pallas_kernels", "jprune.version", "jprune.files", "jprune.interrupt"],
    ["jprune.tracing"],
    ["jprune.surgery"],
    ["jprune.graph"],
    ["jprune.importance", "jprune.data", "jprune.report"],
    ["jprune.budget", "jprune.models"],
    ["jprune.checkpoint"],
    ["jprune.training"],
    ["jprune.language"],
    ["jprune.methods"],
    ["jprune.jobs"],
    ["jprune.flags"],
    ["jprune.cli"],
    ["jprune.__main__"],
]
FLOOR = {name: k for k, names in enumerate(LAYERS) for name in names}
FACES = {"jprune", "jprune.methods"}  # hand names on from above, when they are asked for


def modules(tops=("jprune", "pallas_kernels")):
    """{module: file} of the library."""
    found = {}
    for top in tops:
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(tree, known):
    """Modules of the library that a file imports, wherever it does; for the type checker alone ones left out."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.append(whole if whole in known else node.module)
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif not isinstance(node, ast.expr):
            left += ast.iter_child_nodes(node)
    return found


def place(module):
    """The entry of LAYERS that a module belongs to."""
    return next((p for p in (module, ".".join(module.split(".")[:2]), module.split(".")[0]) if p in FLOOR), None)


@functools.cache
def parsed(file):
    return ast.parse(file.read_text())


@functools.cache
def library():
    """The imports of the library."""
    return graph_of(FILES)


def graph_of(files):
    graph = nx.DiGraph()
    for module, file in files.items():
        for other in imports(parsed(file), files):
            if other in files:
                graph.add_edge(module, other)
    return graph


FILES = modules()


def upward(graph):
    """Imports that do not run downward."""
    return [
        (a, b)
        for a, b in graph.edges
        if a not in FACES and place(a) != place(b) and (place(b) is None or FLOOR[place(b)] >= FLOOR[place(a)])
    ]


def test_every_module_has_a_place():
    assert {m for m in FILES if place(m) is None} <= FACES and len(FILES) > 200


def test_every_import_runs_downward():
    assert upward(library()) == []
    wrong = nx.DiGraph([("jprune.models.vit", "jprune.methods.contract"), ("jprune.data.text", "jprune.report.page")])
    assert len(upward(wrong)) == 2


def test_there_is_no_circle():
    assert list(nx.simple_cycles(library())) == []
    assert list(nx.simple_cycles(graph_of(modules(("experiments",))))) == []
    ring = nx.DiGraph([("a", "b"), ("b", "a")])
    assert list(nx.simple_cycles(ring))


def test_methods_do_not_know_jobs_and_models_do_not_know_methods():
    assert not [e for e in library().edges if place(e[0]) == "jprune.methods" and place(e[1]) == "jprune.jobs"]
    assert not [e for e in library().edges if place(e[0]) == "jprune.models" and place(e[1]) == "jprune.methods"]


@pytest.mark.parametrize("folder", sorted({f.parent for f in FILES.values()}))
def test_every_file_of_a_folder_says_what_it_holds(folder):
    for file in sorted(folder.glob("*.py")):
        first = (ast.get_docstring(parsed(file)) or "").split("\n")[0]
        assert len(first.split()) >= 5 or file.name == "version.py", f"{file}: {first!r}"
    if (folder / "__init__.py").stat().st_size < 2000 and folder.parent != ROOT:
        assert len(ast.get_docstring(parsed(folder / "__init__.py"))) > 40


def test_the_public_names_are_those_that_are_shown_and_all_can_be_reached():
    assert {"trace", "Graph", "Group", "Plan", "Rule", "register_rule", "load", "save", "rebuild", "KeepError",
            "NotPrunable", "TraceError", "importance", "budget", "methods", "models", "checkpoint", "training",
            "language"} <= set(dir(jprune))  # fmt: skip
    for name in dir(jprune):
        assert getattr(jprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        jprune.prune_everything  # noqa: B018


def test_import_brings_nothing_heavy():
    """`import jprune` alone loads no jax: what is asked for is loaded then, and a module of it without a second import."""
    code = "import sys, jprune; assert 'jax' not in sys.modules; jprune.budget.Target; print(jprune.trace.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "trace\n"), done.stderr
