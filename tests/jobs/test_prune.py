"""The main job: what it writes is true, it survives a kill, and what users get wrong is one line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from few_digits import few_digits

import jprune
from jprune import budget, checkpoint, cli, methods
from jprune.data import load_digits
from jprune.jobs import ClassifierConfig, ClassifierRun, classifier, load_plan, load_pruned
from jprune.methods.channels.after_training import AfterTrainingConfig
from jprune.methods.channels.masksparsity import masksparsity as ms
from jprune.methods.channels.masksparsity import run as masksparsity_run
from jprune.methods.contract import Amount, ClassifierTask, NoConfig
from jprune.methods.names import METHODS, TABLE
from jprune.models import MODELS, build, resnet
from jprune.tracing.paths import flatten
from jprune.training import evaluate
from jprune.training.run_folder import RunFolder

OPTIONS = ClassifierConfig(model="resnet_digits", epochs=1)
SETTINGS = AfterTrainingConfig(finetune_epochs=1)
FEW = dataclasses.replace(OPTIONS, model="tiny", batch_size=16)
ARGUMENTS = ["prune", "--model", "resnet_digits", "--epochs", "1", "--finetune-epochs", "1"]


def command(*arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "jprune", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)  # fmt: skip


def hearing_ctrl_c():
    """A shell that starts the tests in the background has its children ignore Ctrl-C; undo that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(*arguments):
    process = command(*arguments)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """One more name in the zoo: two blocks, of which every step of a run is traced and compiled in a third of the time."""
    entry = dataclasses.replace(MODELS["resnet_digits"], make=lambda n: resnet.small((1, 1), n, widths=(8, 16)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", entry)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "load_digits", lambda seed: few_digits(32, 48, seed))
        return out, ClassifierRun(FEW, out, SETTINGS, quiet=True)()


def test_the_folder_holds_everything(run):
    out, summary = run
    names = {"checkpoint", "plan.json", "metrics.jsonl", "summary.json", "report.html", "options.json", "phases",
             "widths.png", "curve.png", "importance.png", "timeline.png"}  # fmt: skip
    assert {p.name for p in out.iterdir()} == names
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for png in out.glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert f"{summary['after']['params']:,}" in page and "tiny" in page
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["phase"] for r in lines if r["kind"] == "epoch"] == ["baseline", "fine-tune"]
    assert sum(r["kind"] == "step" for r in lines) == 2 * 2


def test_the_numbers_are_those_of_the_files(run):
    out, summary = run
    module, small, metadata = load_pruned(out)
    data = few_digits(32, 48)
    before, after = summary["before"], summary["after"]
    assert evaluate(module, small, data).accuracy == after["accuracy"]
    params = jax.tree.leaves(small["params"])
    assert after["params"] == sum(x.size for x in params)
    assert after["param_bytes"] == sum(x.nbytes for x in jax.tree.leaves(small))
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    graph = jprune.trace(module.apply, small, x)
    assert after["macs"] == graph.cost().macs // 2 <= before["macs"] / 2
    assert summary["kept"]["macs"] == pytest.approx(after["macs"] / before["macs"])
    assert after["latency_ms"] > 0 and after["peak_bytes"] < before["peak_bytes"]
    assert metadata["options"] == {**dataclasses.asdict(FEW), **dataclasses.asdict(SETTINGS)}
    dense = build("tiny", 10)
    shapes = jax.eval_shape(dense.init, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    planned = load_plan(out).apply(zeros)
    assert jax.tree.map(np.shape, planned) == jax.tree.map(np.shape, small)
    assert summary["curve"]["macs_fraction"][0] == 1.0 and len(summary["curve"]["accuracy"]) > 5


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    ClassifierRun(OPTIONS, whole, SETTINGS, quiet=True)()
    process = command(*ARGUMENTS, "--out", out, "--quiet")
    file = out / "phases" / "fine-tune" / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_text().count("\n") > 2):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "checkpoint").exists() and not (out / "summary.json").exists()
    code, _, err = finished(*ARGUMENTS, "--out", out, "--quiet")
    assert code == 2 and "--resume" in err
    code, _, err = finished(*ARGUMENTS, "--out", out, "--quiet", "--resume", "--seed", "1")
    assert code == 2 and "seed = 0, now it is 1" in err.replace("\n", " ")
    code, _, err = finished(*ARGUMENTS, "--out", out, "--quiet", "--resume")
    assert code == 0, err
    for a, b in zip(*(jax.tree.leaves(checkpoint.load(f / "checkpoint")[0]) for f in (whole, out)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path):
    process = command(
        "prune", "--model", "resnet_digits", "--out", tmp_path / "o", "--quiet", preexec_fn=hearing_ctrl_c
    )
    while process.poll() is None and not (tmp_path / "o" / "phases" / "baseline" / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)  # what is being compiled is compiled to its end
    assert process.returncode == 130
    assert err.strip().endswith("--resume") and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet21"}, "resnet20"),
        ({"method": "magnitud"}, "magnitude-l"),
        ({"data": "mnist"}, "digits"),
        ({"keep": 1.5}, "above 0 and up to 1"),
        ({"sparsity": 1.0}, "at least 0 and below 1"),
        ({"sparsity": 0.5, "keep": 0.5}, "either --sparsity"),
        ({"quantity": "joules"}, "macs or params or bytes or latency"),
        ({"data": "cifar10"}, "data_dir"),
        ({"epochs": 0}, "epochs"),
        ({"method": "precrop", "quantity": "bytes"}, "counts macs or params"),
        ({"method": "masksparsity", "quantity": "macs"}, "counts units"),
    ],
)
def test_wrong_options_are_named_before_anything_is_trained(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierRun(ClassifierConfig(**{**dataclasses.asdict(OPTIONS), **options}), tmp_path / "o", quiet=True)()


@pytest.mark.parametrize("settings", [{"steps": 0}, {"multiple_of": 0}, {"scope": "local"}, {"finetune_epochs": -1}])
def test_wrong_settings_of_a_method_are_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*: it must be"):
        AfterTrainingConfig(**settings)


def test_settings_of_another_method_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the settings of 'taylor' are a AfterTrainingConfig"):
        ClassifierRun(dataclasses.replace(OPTIONS, method="taylor"), tmp_path / "o", NoConfig(), quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "quantity", "target"),
    [("precrop-snip", "params", 0.2), ("preconfig", "params", 0.6)],
)
def test_small_from_the_start(method, quantity, target, tmp_path):
    options = ClassifierConfig(model="resnet_digits", method=method, quantity=quantity, keep=target, epochs=2)
    summary = ClassifierRun(options, tmp_path / "o", options.chosen.config(multiple_of=2), quiet=True)()
    before, after = summary["before"], summary["after"]
    assert after[quantity] <= target * before[quantity] < after[quantity] * 1.05
    assert summary["kept"][quantity] == pytest.approx(after[quantity] / before[quantity])
    assert after["macs"] <= before["macs"] and after["params"] <= before["params"]
    assert all(w % 2 == 0 for _, w in summary["widths"].values())
    assert any(w > was for was, w in summary["widths"].values()) == (method == "preconfig")
    module, small, _ = load_pruned(tmp_path / "o")
    assert evaluate(module, small, load_digits()).accuracy == after["accuracy"]
    assert after["params"] == sum(x.size for x in jax.tree.leaves(small["params"]))
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [r["phase"] for r in lines if r["kind"] == "epoch"] == ["baseline"] * 2 + ["from scratch"] * 2
    with pytest.raises(ValueError, match=r"plan\.json"):
        load_plan(tmp_path / "o")


@pytest.mark.slow
def test_shrunk_while_trained(tmp_path):
    options = ClassifierConfig(model="resnet_digits", method="lapp", epochs=4)
    summary = ClassifierRun(options, tmp_path / "o", quiet=True)()
    before, after = summary["before"], summary["after"]
    assert 0.47 * before["macs"] < after["macs"] <= before["macs"] / 2
    model, small, metadata = load_pruned(tmp_path / "o")
    assert evaluate(model, small, load_digits()).accuracy == after["accuracy"]
    assert {g: len(k) for g, k in metadata["lapp"]["keep"].items()} == {g: w for g, (_, w) in summary["widths"].items()}
    x = jnp.zeros((2, 8, 8, 1))
    assert jprune.trace(model.evaluate, small, x).cost().macs // 2 == after["macs"]  # bypasses included
    assert after["params"] == sum(x.size for x in jax.tree.leaves(small["params"]))
    assert (tmp_path / "o" / "thresholds.png").read_bytes().startswith(b"\x89PNG")
    assert "bypass" in (tmp_path / "o" / "report.html").read_text()


@pytest.mark.parametrize(("method", "message"), [("precrop", "is the least"), ("lapp", "is left when every")])
def test_a_width_budget_out_of_reach_is_refused_before_anything_is_written(method, message, tmp_path):
    options = ClassifierConfig(model="resnet_digits", method=method, keep=0.001)
    with pytest.raises(ValueError, match=message):
        ClassifierRun(options, tmp_path / "o", quiet=True)
    assert not (tmp_path / "o").exists()


def test_an_unreachable_target_says_what_is_reachable(tmp_path):
    with pytest.raises(ValueError, match=r"choose a fraction in \["):
        ClassifierRun(dataclasses.replace(OPTIONS, keep=0.0001), tmp_path / "o", quiet=True)
    assert not (tmp_path / "o").exists()  # said before anything is trained or written


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not a pruning run"):
        ClassifierRun(OPTIONS, tmp_path)
    with pytest.raises(ValueError, match="no checkpoint folder"):
        load_pruned(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_errors_are_one_line_on_the_command_line(tmp_path):
    code, out, err = finished("prune", "--model", "resnet21", "--out", tmp_path / "o")
    assert code == 2 and not out
    assert err.startswith("error: no model 'resnet21'") and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.fixture
def said(monkeypatch, capsys):
    """(status, output, errors) of the command, in this process."""

    def of(*words):
        monkeypatch.setattr(sys, "argv", ["jprune", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return of


def test_list_and_explain(said):
    code, out, _ = said("list")
    assert code == 0
    assert all(name in out for name in (*(n for kind in TABLE.values() for n in kind), "resnet20", "cifar100"))
    code, out, _ = said("explain", "resnet20")
    assert code == 0
    assert "12 groups with 448 prunable units" in out and "40,813,184" in out.replace("81,626,368", "40,813,184")
    code, out, _ = said("explain", "resnet20", "--path", "params/head/kernel", "--axis", "1")
    assert code == 0 and "MODEL_OUTPUT" in out
    code, _, err = said("explain", "resnet20", "--path", "params/haed/kernel")
    assert code == 2 and "params/head/kernel" in err


@pytest.mark.parametrize("subcommand", [[], ["prune"], ["explain"], ["list"]])
def test_help_teaches(subcommand, said):
    code, out, _ = said(*subcommand, "--help")
    assert code == 0 and "usage: jprune" in out
    if subcommand == ["prune"]:
        assert "--finetune-epochs" in out and "share of --quantity to KEEP" in out


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """What a method sees of a small network with BatchNorm that nobody has trained."""
    run = ClassifierRun(OPTIONS, tmp_path_factory.mktemp("task") / "o", SETTINGS, quiet=True)
    run.release()
    model, data = resnet.small((1, 1), widths=(8, 16)), few_digits(128, 48)
    fresh = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
    return dataclasses.replace(
        run.task, model=model, graph=jprune.trace(model.apply, fresh, *run.task.example), variables=fresh, fresh=fresh,
        data=data, run=RunFolder(), examples=lambda: [(data.test.images, data.test.labels)])  # fmt: skip


SCORED = sorted(n for n, m in METHODS["classifiers"].items() if issubclass(m.config, AfterTrainingConfig))


@pytest.mark.parametrize("name", SCORED)
def test_every_method_scores_every_group_of_a_network_with_batchnorm(name, task):
    scores = METHODS["classifiers"][name].find.keywords["score"](task)
    assert scores.keys() == task.graph.groups.keys()
    for g, s in scores.items():
        assert s.shape == (task.graph.groups[g].size,) and np.isfinite(s).all()


def test_a_method_is_a_function_of_its_task_and_needs_no_folder(task):
    """The contract as other programs use it: weights, data and an amount in, a smaller model out."""
    config = AfterTrainingConfig(finetune_epochs=0)
    found = methods.method("magnitude-l2").find(
        dataclasses.replace(task, amount=Amount.of("params", sparsity=0.5)), config
    )
    small = sum(x.size for x in jax.tree.leaves(found.variables["params"]))
    dense = sum(x.size for x in jax.tree.leaves(task.variables["params"]))
    assert small == found.cost.params <= dense / 2
    graph = jprune.trace(found.model.apply, found.variables, jnp.zeros((2, 8, 8, 1)))
    assert graph.cost().macs == found.cost.macs
    assert all(tuple(w) == (k.size, k.sum()) for w, k in zip(found.widths.values(), found.keep.values(), strict=True))


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_later_steps_score_the_smaller_network_by_its_own_loss(name, task):
    amount = Amount.of("macs", keep=0.5)
    config = AfterTrainingConfig(finetune_epochs=0, steps=2)
    found = methods.method(name).find(dataclasses.replace(task, amount=amount), config)
    assert 0.4 * task.graph.cost().macs < found.cost.macs <= 0.5 * task.graph.cost().macs


@pytest.mark.parametrize(
    ("name", "settings"),
    [("wanda",
      {"pattern": "2:4", "leaves": "params/stage*/conv2/kernel"}), 
     ("obert", {"samples": 8, "leaves": "params/stage*/conv2/kernel", "pattern": "leaf"}),
     *[pytest.param(*case, marks=pytest.mark.slow) for case in (
         ("sparsegpt", {}), ("wanda", {"by_share": True}), ("icbs", {"steps": 2, "solver": "descent", "samples": 16}),
         ("woodfisher", {"samples": 8, "taylor": True, "pattern": "leaf", "stages": 2}),
         ("icbs", {"steps": 2, "samples": 16, "solver": "descent", "selection": "wanda", "start": "wanda"}),
         ("cap", {"samples": 8, "pattern": "2:4", "fisher_block": 32, "leaves": "params/stage*/conv2/kernel"}),
         ("cbs", {"samples": 8}), ("chita", {"samples": 8, "stages": 3, "damp": 0.01}))],
     ("weight-magnitude", {"pattern": "model"})],
)  # fmt: skip
def test_single_weights_go_and_all_widths_stay(name, settings, task):
    method = methods.method(name)
    config = method.config(**settings)
    method.check(task, config)
    amount = None if "2:4" in str(settings) else Amount.of("weights", sparsity=0.75)
    found = method.find(dataclasses.replace(task, amount=amount), config)
    assert found.masks and found.keep is None and found.cost == task.graph.cost()
    density = found.notes["weights"]["density"]
    assert density == pytest.approx(0.5 if amount is None else 0.25, abs=1e-3)
    leaves = dict(flatten(found.variables))
    assert all(not np.asarray(leaves[p])[~np.asarray(m)].any() for p, m in found.masks.items())
    if settings.get("pattern") == "leaf":
        assert {round(float(np.mean(m)), 2) for m in found.masks.values()} == {0.25}
    assert found.notes["weights"]["macs_of_kept"] < task.graph.cost().macs
    with pytest.raises(ValueError, match="fits none of the weights"):
        method.check(task, dataclasses.replace(config, leaves="params/nothing*"))


def test_latency_is_a_target_like_any_other(task, monkeypatch):
    """The table is measured (here: one second a MAC), asked once, and the decision meets it from below."""
    monkeypatch.setattr(budget, "measure_latency", lambda graph, *_, **__: Linear(graph))
    wanted = dataclasses.replace(task, amount=Amount.of("latency", keep=0.4), run=RunFolder())
    config = AfterTrainingConfig(finetune_epochs=0)
    method = methods.method("magnitude-l1")
    method.check(wanted, config)
    found = method.find(wanted, config)
    by_macs = method.find(dataclasses.replace(task, amount=Amount.of("macs", keep=0.4)), config)
    assert {g: k.tolist() for g, k in found.keep.items()} == {g: k.tolist() for g, k in by_macs.keep.items()}
    with pytest.raises(ValueError, match=r"choose a fraction in \["):
        method.check(dataclasses.replace(wanted, amount=Amount.of("latency", keep=1e-6)), config)


def test_measured_tables_are_kept_so_that_a_run_that_goes_on_decides_alike(task, monkeypatch, tmp_path):
    measured, real = [], budget.measure_latency

    def timed(graph, fn, args, **_):
        measured.append(graph)
        return real(
            graph, fn, args, timer=lambda fn, args: float(sum(map(np.size, jax.tree.leaves(args)))), progress=False
        )

    monkeypatch.setattr(budget, "measure_latency", timed)
    config = AfterTrainingConfig(finetune_epochs=0, steps=2)
    kept = []
    for _ in range(2):
        run = RunFolder(tmp_path / "o")
        asked = dataclasses.replace(task, amount=Amount.of("latency", keep=0.8), run=run)
        kept.append(methods.method("magnitude-l1").find(asked, config).keep)
    assert len(measured) == 2  # one a step; the second run reads both
    assert (tmp_path / "o" / "phases" / "latency-2" / "table.json").is_file()
    assert {g: k.tolist() for g, k in kept[0].items()} == {g: k.tolist() for g, k in kept[1].items()}


class Linear:
    """A latency table by which every MAC takes equally long."""

    def __init__(self, graph):
        self.graph = graph

    def __call__(self, widths):
        return float(self.graph.cost(widths=widths).macs)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slimming", "taylor"])
def test_methods_and_steps_end_to_end(method, tmp_path):
    more = {"steps": 2, "schedule": "cubic"} if method == "taylor" else {}
    options = ClassifierConfig(model="resnet_digits", method=method, epochs=6)
    settings = options.chosen.config(finetune_epochs=4, **more)
    summary = ClassifierRun(options, tmp_path / "o", settings, quiet=True)()
    assert summary["after"]["macs"] <= summary["before"]["macs"] / 2
    assert summary["after"]["accuracy"] > 0.9
    module, small, _ = load_pruned(tmp_path / "o")
    assert evaluate(module, small, load_digits()).accuracy == summary["after"]["accuracy"]


class Handed(Exception):
    """Carries what a function was called with."""


def test_masksparsity_of_the_command_is_the_documented_one(tmp_path, monkeypatch):
    """Threshold and vote, from the run's baseline, its phases trained by the run; a budget has no part in it."""

    def handed(*arguments, **named):
        raise Handed(arguments, named)

    monkeypatch.setattr(masksparsity_run, "run", handed)
    for more, rule in (
        ({}, ms.MaskRule("threshold", 0.02)),
        ({"sparsity": 0.7}, ms.MaskRule("sparsity", 0.02, sparsity=0.7)),
    ):
        options = dataclasses.replace(OPTIONS, method="masksparsity", **more)
        config = options.chosen.config(threshold=0.02, strength=0.3, finetune_epochs=1)
        run = ClassifierRun(options, tmp_path / f"o{len(more)}", config, quiet=True)
        run.release()
        seen = []
        monkeypatch.setattr(ClassifierTask, "fit", lambda self, *a, seen=seen: seen.append(a) or "trained")
        with pytest.raises(Handed) as found:
            run.method.find(dataclasses.replace(run.task, variables="baseline weights"), config)
        (model, weights, data, config), named = found.value.args
        assert model is run.model and weights == "baseline weights" and data is run.data
        assert config.rule == rule and config.rule.reduce == "vote" and config.coupled and config.baseline is None
        assert (config.prune_by, config.prune_threshold, config.rounds) == ("threshold", 0.02, 1)
        assert (config.strength_global, config.strength) == (0.3, 0.3)
        assert (config.sparse.epochs, config.finetune.epochs) == (1, 1)
        assert named["train_fn"]("round1-masked", "forward", "weights", config.sparse, "penalty") == "trained"
        assert seen == [("masked", config.sparse, "forward", "weights", "penalty")]


@pytest.mark.slow
def test_masksparsity_end_to_end(tmp_path):
    options = ClassifierConfig(model="resnet_digits", method="masksparsity", epochs=6, sparsity=0.5)
    summary = ClassifierRun(options, tmp_path / "o", options.chosen.config(finetune_epochs=2), quiet=True)()
    said = summary["masksparsity"]
    assert summary["after"]["macs"] < 0.8 * summary["before"]["macs"] and summary["after"]["accuracy"] > 0.9
    assert said["accuracy"]["finetuned"] == summary["after"]["accuracy"]
    gone = sum(was - now for was, now in summary["widths"].values())
    assert gone == sum(said["masked"].values()) - said["masked_survivors"] + said["unmasked_losses"]
    module, small, _ = load_pruned(tmp_path / "o")
    assert evaluate(module, small, load_digits()).accuracy == summary["after"]["accuracy"]
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(r["phase"] for r in lines)) == ["baseline", "global", "masked", "finetune"]
    assert "(asked for: 50.00%)" in (tmp_path / "o" / "report.html").read_text()


@pytest.mark.slow
def test_the_default_run_keeps_its_promises(tmp_path):
    out = tmp_path / "default"
    code, _, err = finished("prune", "--out", out)
    assert code == 0, err
    summary = json.loads((out / "summary.json").read_text())
    assert 0.48 < summary["after"]["macs"] / summary["before"]["macs"] <= 0.5
    assert summary["after"]["accuracy"] > summary["before"]["accuracy"] - 0.02
