"""A language model's folder, pruned by the command: what is written is true, runs go on, mistakes are one line."""

import contextlib
import dataclasses
import html
import io
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import jprune
from jprune.checkpoint import load_hf, save_hf
from jprune.checkpoint.masks import load_masks
from jprune.files.lock import FolderLock
from jprune.jobs import DecoderConfig, DecoderRun
from jprune.jobs import decoder as language
from jprune.language.blocks import blocks
from jprune.language.perplexity import Speed, perplexity
from jprune.methods.channels import decoder_baselines as baselines
from jprune.methods.contract import Amount
from jprune.methods.names import METHODS
from jprune.models.llama import Llama, llama_config
from jprune.models.moe import Experts, TopK
from jprune.surgery.kernels import weight_matrices
from jprune.surgery.patterns import check
from jprune.tracing.paths import flatten
from jprune.training.run_folder import RunFolder

CONFIG = llama_config(256, 32, 48, 3, 4, kv_heads=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of bytes and a text."""
    place = tmp_path_factory.mktemp("language")
    v = jax.jit(Llama(CONFIG).init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    save_hf(jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, v), CONFIG, place / "dense")
    (place / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(900)))
    return place


def options(place, **more):
    return DecoderConfig(str(place / "dense"), **{"calibration": str(place / "text.txt"), "sequences": 6, "length": 24,
                         "batch_size": 2, **more})  # fmt: skip


def ready(place, name, resume=False, **more):
    """A run that is asked for, its method's settings among the options."""
    job = {f.name for f in dataclasses.fields(DecoderConfig)}
    own = {k: more.pop(k) for k in list(more) if k not in job}
    asked = options(place, **more)
    return DecoderRun(asked, place / name, asked.chosen.config(**own), resume, quiet=True)


def run(place, name, **more):
    return ready(place, name, **more)()


@pytest.fixture(scope="module")
def whole(place):
    return place / "whole", run(place, "whole", sparsity=0.25, recover=4, learning_rate=1e-2)


def test_the_folder_holds_everything_and_loads(whole, place):
    out, summary = whole
    assert {p.name for p in out.iterdir()} == {"model", "plan.json", "metrics.jsonl", "summary.json", "report.html",
                                               "options.json", "phases", "widths.png"}  # fmt: skip
    config, params, meta = load_hf(out / "model")
    assert list(config.ffn) == summary["widths"]["ffn"] and sum(config.ffn) == 0.75 * 3 * 48
    assert sum(x.size for x in jax.tree.leaves(params)) == summary["after"]["params"] < summary["before"]["params"]
    assert meta["record"]["method"] == "cfsp" and meta["record"]["target"] == 0.25
    texts = ready(place, "texts").texts
    assert perplexity(Llama(config), params, texts.evaluation, 2) == pytest.approx(
        summary["after"]["perplexity"], rel=1e-5
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(r["phase"], r["step"]) for r in lines] == [("recover", i + 1) for i in range(4)]
    page = (out / "report.html").read_text()
    assert f"{summary['after']['perplexity']:.3f}" in page and "25.0% of ffn channels" in page


def test_recovery_helps(whole):
    _, summary = whole
    assert summary["after"]["perplexity"] < 0.9 * summary["before"]["perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["uniform", "padded"])
def test_forms(place, form):
    summary = run(place, form, form=form, scope="uniform" if form == "uniform" else "global", multiple_of=8)
    config, _, meta = load_hf(place / form / "model")
    assert summary["form"] == meta["record"]["mode"] == form
    assert (len(set(config.ffn)) == 1) == (form == "uniform") and all(f % 8 == 0 for f in config.ffn)


@pytest.mark.slow
def test_heads_and_channels_go_while_adapters_train(place):
    summary = run(place, "loraprune", method="loraprune", sparsity=0.5, recover=12)
    assert summary["widths"] == {"ffn": [24, 24, 48], "q_heads": [2, 2, 4], "kv_heads": [1, 1, 2]}
    config, params, _ = load_hf(place / "loraprune" / "model")
    assert (
        config.kv_heads == (1, 1, 2)
        and np.isfinite(jax.jit(Llama(config).apply)(params, np.ones((1, 5), np.int32))).all()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [n for n, m in METHODS["decoders"].items() if m.removes == "channels" and n not in ("cfsp", "loraprune")]
)
def test_every_method_removes_what_was_asked(place, method):
    summary = run(place, method, method=method, sparsity=0.5)
    assert summary["removed"]["block_linear_weights"] > 0.2
    assert summary["after"]["params"] < summary["before"]["params"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A folder with a model of bytes whose MLPs are experts, and a text."""
    place = tmp_path_factory.mktemp("experts")
    config = llama_config(256, 32, 12, 2, 4, kv_heads=2, experts=Experts(6, TopK(2), gated=True), family="mixtral")
    v = jax.jit(Llama(config).init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    save_hf(jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, v), config, place / "dense")
    (place / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(900)))
    return place, v["params"]


EXPERTS = [n for n, m in METHODS["decoders"].items() if m.removes == "experts"]


@pytest.mark.parametrize("method", [n if n == "reap" else pytest.param(n, marks=pytest.mark.slow) for n in EXPERTS])
def test_whole_experts_go(experts, method):
    place, before = experts
    summary = run(place, method, method=method, **({} if method == "expert-idle" else {"experts": 0.5}))
    config, params, meta = load_hf(place / method / "model")
    left = config.experts.count
    assert (left == 3 or method == "expert-idle") and summary["removed"]["experts"] == 1 - left / 6
    assert summary["kept"]["units"] == left / 6 and meta["record"]["method"] == method
    units = json.loads((place / method / "units.json").read_text())
    for i, (layer, kept) in enumerate(units.items()):
        assert layer == f"layer{i}" and len(kept) == left
        np.testing.assert_array_equal(
            params["params"][layer]["experts"]["down"], 3 * np.asarray(before[layer]["experts"]["down"])[kept]
        )
    assert f"{left} of 6" in (place / method / "report.html").read_text()


def test_what_experts_do_not_allow_is_said_first(experts):
    place, _ = experts
    for message, more in {
        "method 'cfsp' removes channels of MLPs, and .* has experts": {"method": "cfsp"},
        "recover is not offered": {"method": "reap", "recover": 3},
        "leaves 1, but a token goes to 2": {"method": "reap", "sparsity": 0.9},
        "not both": {"method": "reap", "sparsity": 0.5, "experts": 0.5},
    }.items():
        with pytest.raises(ValueError, match=message):
            ready(place, "refused", **more)
    assert not (place / "refused").exists()


WEIGHTS = [("wanda", {"pattern": "2:4"})] + [
    pytest.param(n, more, marks=pytest.mark.slow)
    for n, more in (
        ("weight-magnitude", {}),
        ("sparsegpt", {"refit_kept": True}),
        ("icbs", {"steps": 4, "solver": "descent", "start": "wanda", "selection": "wanda"}),
        ("obert", {"samples": 6, "stages": 2}),
        ("cap", {"samples": 6, "pattern": "2:4", "fisher_block": 16}),
        ("chita", {"samples": 6}),
    )
]


@pytest.mark.parametrize(("method", "more"), WEIGHTS)
def test_single_weights_go_and_the_folder_keeps_its_shape(place, method, more):
    summary = run(place, f"weights {method}", method=method, **more)
    out = place / f"weights {method}"
    config, params, meta = load_hf(out / "model")
    assert config == CONFIG and meta["record"]["method"] == method and summary["widths"]["ffn"] == [48, 48, 48]
    masks = load_masks(out / "masks.safetensors", params)
    leaves = dict(flatten(params))
    assert len(masks) == 3 * 7 and all(not np.asarray(leaves[p])[~m].any() for p, m in masks.items())
    zeros = sum(int((np.asarray(leaves[p]) == 0).sum()) for p in masks)
    assert zeros == summary["weights"]["of"] - summary["weights"]["kept"] == summary["weights"]["of"] // 2
    assert summary["kept"]["weights"] == 0.5 and (out / "weights.png").is_file()
    assert summary["after"]["perplexity"] != summary["before"]["perplexity"]
    if "pattern" in more:
        graph = jprune.trace(Llama(config).apply, params, np.zeros((2, 4), np.int32))
        check(masks, "2:4", weight_matrices(graph, masks))


@pytest.mark.parametrize(
    ("more", "why"),
    [({"method": "wanda", "pattern": "2:4", "sparsity": 0.3}, "2:4 removes 0.5 of the weights, not 0.3"),
     ({"method": "wanda", "pattern": "5:7"}, "innermost input axis has 32 entries, which 7 does not divide"),
     ({"method": "wanda", "pattern": "2:4", "by_share": True}, "lets outputs keep different numbers of weights"),
     ({"method": "icbs", "pattern": "2:4"}, "would break N:M groups"),
     ({"method": "obert", "pattern": "2:4"}, "unstructured or leaf or model, which this method can follow"),
     ({"method": "wanda", "quantity": "macs", "sparsity": 0.5}, "counts weights"),
     ({"method": "wanda", "recover": 3}, "fills the zeros again")],
)  # fmt: skip
def test_what_single_weights_cannot_do_is_refused_before_anything_is_read(place, more, why):
    with pytest.raises(ValueError, match=why):
        ready(place, "refused", **more)
    assert not (place / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cfsp", "loraprune"])
def test_an_interrupted_run_goes_on_with_the_same_bits(place, method, monkeypatch):
    asked = {"method": method, "recover": 24, "learning_rate": 1e-3}
    straight = run(place, f"straight {method}", **asked)
    draw = DecoderRun.batch_of_step

    def stopping(self, step):
        if step == 15:  # behind the checkpoint of step 10
            raise KeyboardInterrupt
        return draw(self, step)

    monkeypatch.setattr(DecoderRun, "batch_of_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(place, f"cut {method}", **asked)
    asked_steps = []
    monkeypatch.setattr(DecoderRun, "batch_of_step", lambda self, step: asked_steps.append(step) or draw(self, step))
    summary = run(place, f"cut {method}", resume=True, **asked)
    assert asked_steps == list(range(10, 24))
    assert summary["after"]["perplexity"] == straight["after"]["perplexity"]
    ways = [(place / f"{way} {method}" / "model" / "model.safetensors").read_bytes() for way in ("straight", "cut")]
    assert ways[0] == ways[1]


@pytest.mark.slow
def test_the_command(place, whole):
    """The same run by the command line: the same model, and a folder that is taken is not overwritten."""
    words = ["--model", place / "dense", "--calibration", place / "text.txt", "--sequences", 6, "--length", 24,
             "--batch-size", 2, "--sparsity", 0.25, "--recover", 4, "--learning-rate", 1e-2]  # fmt: skip

    def prune(*more):
        done = subprocess.run([sys.executable, "-m", "jprune", "prune", *map(str, [*words, *more])],
                              capture_output=True, text=True, timeout=900)  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    status, out, err = prune("--out", place / "command")
    assert status == 0, err
    assert "perplexity" in out and "report.html" in out
    models = [(at / "model" / "model.safetensors").read_bytes() for at in (place / "command", whole[0])]
    assert models[0] == models[1]
    status, _, err = prune("--out", place / "command", "--epochs", 3)
    assert (status, err.count("\n")) == (2, 1) and "--epochs means nothing here" in err


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"calibration": None}, "calibration is None: it must be a text file"),
        ({"calibration": "/nowhere.txt"}, "no file or folder /nowhere.txt"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"method": "cspf"}, "did you mean cfsp"),
        (
            {"length": 5000},
            r"has 21,817 tokens, of which 2,182 are held back.*--evaluation, or .* at most --length 2182",
        ),
        ({"method": "loraprune"}, "give --recover STEPS"),
        ({"method": "loraprune", "recover": 1}, "pruning step"),
        ({"quantity": "params", "keep": 0.05}, "is left when every layer keeps as little as it may"),
        ({"form": "uniform", "method": "flap-plain"}, "needs layers of equal width: give --form padded"),
        ({"quantity": "latency"}, "counts units or params or macs or bytes"),
        ({"sparsity": 0.3, "keep": 0.7}, "either --sparsity"),
        ({"form": "uniform"}, "needs layers of equal width"),
        ({"mesh": (1, 64)}, "needs 64 devices"),
        ({"mesh": (3, 1)}, "divides the batch"),
        ({"sparsity": 0.9, "multiple_of": 32}, "sparsity can be at most 0.33"),
        ({"sparsity": 0.99}, "sparsity can be at most 0.97"),
        ({"sparsity": 0.99, "method": "loraprune", "recover": 20}, "sparsity can be at most 0.5"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(place, more, what, monkeypatch):
    monkeypatch.setattr(language, "load_hf", lambda *a, **k: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=what):
        ready(place, "never/run", **more)
    assert not (place / "never").exists()


@pytest.mark.parametrize("quantity", ["params", "macs", "bytes"])
def test_a_share_of_the_whole_model_is_met_from_below_by_the_methods_own_decision(place, quantity):
    """CFSP counts channels; asked for a share of the parameters it removes as many of them as that takes, no more."""
    asked = ready(place, f"share {quantity}", keep=0.9, quantity=quantity)
    asked.release()
    task = asked._task(asked.params)
    found = asked.method.find(dataclasses.replace(task, run=RunFolder()), asked.settings)
    dense = getattr(task.graph.cost(), quantity)
    channels = sum(before - after for before, after in found.widths.values())
    unit = (dense - getattr(found.cost, quantity)) / channels
    assert 0.9 * dense - 2 * unit <= getattr(found.cost, quantity) <= 0.9 * dense
    out_of_reach = dataclasses.replace(task, amount=Amount.of(quantity, keep=0.01), run=RunFolder())
    with pytest.raises(ValueError, match=r"out of reach; .* is the least this method reaches"):
        asked.method.find(out_of_reach, asked.settings)
    nothing = jax.tree.map(lambda x: x * np.nan, task.variables)
    with pytest.raises(ValueError, match="not finite"):  # what the method says, not that --keep is too small
        asked.method.find(dataclasses.replace(task, variables=nothing, run=RunFolder()), asked.settings)


def test_biases_that_a_method_adds_count_against_the_share(place):
    asked = ready(place, "biases", method="flap", keep=0.8, quantity="params")
    asked.release()
    task = dataclasses.replace(asked._task(asked.params), run=RunFolder())
    found = asked.method.find(task, asked.settings)
    assert sum(x.size for x in jax.tree.leaves(found.variables)) <= 0.8 * task.graph.cost().params


def test_a_folder_that_is_taken_is_refused_before_anything_is_loaded(place, whole, monkeypatch):
    monkeypatch.setattr(language, "load_hf", lambda *a, **k: pytest.fail("the weights were read"))
    monkeypatch.setattr(language, "load_texts", lambda *a: pytest.fail("the text was read"))
    with pytest.raises(ValueError, match="already holds a run: give --resume"):
        ready(place, "whole")
    with FolderLock(whole[0]), pytest.raises(ValueError, match="is in use by process"):
        ready(place, "whole", resume=True, sparsity=0.25, recover=4, learning_rate=1e-2)
    (place / "thesis").mkdir(exist_ok=True)
    (place / "thesis" / "a.tex").write_text("precious")
    with pytest.raises(ValueError, match="not a pruning run"):
        ready(place, "thesis")


@pytest.fixture(scope="module")
def alike(place):
    """A run of a method for heads and channels that treats all layers alike, with made-up speeds: (summary, said, timed)."""
    timed, said = [], io.StringIO()

    def speeds(models, **more):
        timed.append({name: sum(x.size for x in jax.tree.leaves(v)) for name, (_, v) in models.items()})
        return {name: Speed(float(k), float(10 + k)) for k, name in enumerate(models, 1)}

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(language, "speeds", speeds)
        return run(place, "alike", method="taylor", sparsity=0.3), said.getvalue(), timed


def test_both_models_are_timed_together_at_the_end(alike):
    summary, _, timed = alike
    before, after = summary["before"], summary["after"]
    assert timed == [{"before": before["params"], "after": after["params"]}] and after["params"] < before["params"]
    assert [before["prefill"], before["decode"], after["prefill"], after["decode"]] == [1, 11, 2, 12]


def test_methods_that_treat_all_layers_alike_leave_a_plain_folder(alike, place):
    """48 channels at 0.3 are 33.6 a layer: the total of three layers could only be met unevenly."""
    summary, *_ = alike
    assert summary["form"] == "uniform" and summary["widths"]["ffn"] in ([33] * 3, [34] * 3)
    assert load_hf(place / "alike" / "model")[0].uniform


def test_a_method_for_heads_that_removes_none_says_so(alike, place):
    """Of two heads at 0.3 none goes; the least sparsity at which one does, as it is said, is tried out."""
    summary, err, _ = alike
    (text,) = summary["warnings"]
    assert summary["widths"]["kv_heads"] == [2, 2, 2]
    assert f"warning: {text}\n" in err
    assert html.escape(text) in (place / "alike" / "report.html").read_text()
    least = float(re.search(r"first goes at --sparsity (\S+)", text)[1])
    model = Llama(CONFIG)
    params = jax.tree.map(np.ones_like, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32)))
    graph = jprune.trace(model.apply, params, np.zeros((2, 4), np.int32))
    for sparsity, gone in ((least, 1), (round(least - 0.001, 3), 0)):
        keep = baselines.taylor(graph, params, params, sparsity, heads=True)
        assert [int((~keep[b.kv]).sum()) for b in blocks(graph)] == [gone] * 3
