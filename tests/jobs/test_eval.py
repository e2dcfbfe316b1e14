"""A vision transformer's folder and a folder of pictures: what the command writes is true, mistakes are one line."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import lively
from PIL import Image

from jprune.checkpoint.vision import load_vision
from jprune.jobs.vision import VisionEvalConfig, evaluate_tokens, rows
from jprune.methods.tokens import cost as flops
from jprune.methods.tokens.reducers_by_name import METHODS, reducer_for
from jprune.models import vit

MODULE = vit.vit(8, 3, 2, 8, 4, mlp=16)  # images of 32 pixels: 16 patches


def augreg(tree):
    """The tree as the .npz files of "How to train your ViT" name it."""
    p = jax.tree.map(np.asarray, tree["params"])
    layers = {"embedding": p["patch_embed"], "head": p["head"], "Transformer/encoder_norm": p["norm"]}
    for i in range(len(MODULE.config.blocks)):
        ours, theirs = f"block{i + 1}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        layers |= {f"{theirs}/LayerNorm_0": p[f"{ours}_norm1"], f"{theirs}/LayerNorm_2": p[f"{ours}_norm2"],
                   f"{theirs}/MlpBlock_3/Dense_0": p[f"{ours}_fc1"], f"{theirs}/MlpBlock_3/Dense_1": p[f"{ours}_fc2"],
                   f"{attention}/out": p[f"{ours}_attn"]["proj"]}  # fmt: skip
        for k, name in enumerate(("query", "key", "value")):
            layers[f"{attention}/{name}"] = {n: x[..., k, :, :] for n, x in p[f"{ours}_attn"]["qkv"].items()}
    named = {f"{layer}/{leaf}": x for layer, leaves in layers.items() for leaf, x in leaves.items()}
    return named | {"cls": p["cls_token"], "Transformer/posembed_input/pos_embedding": p["pos_embed"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's file, 5 pictures in folders of classes 0, 1 and 3, and the same without folders."""
    place = tmp_path_factory.mktemp("vision")
    (place / "model").mkdir()
    tree = lively(jax.eval_shape(MODULE.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    np.savez(place / "model" / "weights.npz", allow_pickle=False, **augreg(tree))
    rng = np.random.default_rng(0)
    (place / "flat").mkdir()
    for k, name in enumerate("00113"):
        image = Image.fromarray(rng.integers(0, 256, (40 + k, 50, 3)).astype(np.uint8))
        (place / "pictures" / name).mkdir(parents=True, exist_ok=True)
        image.save(place / "pictures" / name / f"{k}.png")
        image.save(place / "flat" / f"{k}.png")
    return place


def options(place, data="pictures", **more):
    return VisionEvalConfig(
        str(place / "model"), str(place / data), **{"batch_size": 2, "pictures": 2, "keep": 0.7, **more}
    )


@pytest.fixture(scope="module")
def done(place):
    return place / "out", evaluate_tokens(options(place), place / "out", quiet=True)


@pytest.mark.smoke
def test_the_answers_are_those_of_the_model(done, place):
    out, summary = done
    assert {p.name for p in out.iterdir()} == {"summary.json", "report.html", "kept.png", "predictions.jsonl"}
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    vision = load_vision(place / "model")
    dims = flops.dims_of(vision.module.config, (32, 32, 3))
    reducer = reducer_for("zero_tprune", 0.7, dims)
    folder = vision.preprocess.folder(place / "pictures")
    images = folder.read(np.arange(5))["image"]
    programs = [jax.jit(lambda x, r=r: vision.module.apply(vision.variables, x, reducer=r)) for r in (None, reducer)]
    answers = [run(images).argmax(-1).tolist() for run in programs]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["all"] for line in lines] == answers[0] and [line["reduced"] for line in lines] == answers[1]
    assert [line["label"] for line in lines] == [0, 0, 1, 1, 3]  # folder 3 is class 3, not the third
    assert lines[4]["file"] == "3/4.png"
    assert summary["before"]["accuracy"] == pytest.approx(np.mean(np.array(answers[0]) == [0, 0, 1, 1, 3]))
    assert summary["after"]["agreement"] == pytest.approx(np.mean(np.equal(*answers)))
    cost = flops.count_macs(reducer, dims)
    assert summary["after"]["macs"] == cost["total"] and summary["after"]["share"] == cost["fraction"] <= 0.7
    assert summary["before"]["share"] == 1 and summary["before"]["tokens"] == 17 > summary["after"]["tokens"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and rows(summary)[1][1] in page


@pytest.mark.slow
def test_pictures_without_labels_are_compared_with_the_whole_model(place, tmp_path):
    found = evaluate_tokens(options(place, "flat", tokens="tome", images=3, pictures=0), tmp_path / "o", quiet=True)
    assert found["images"] == 3 and found["before"]["accuracy"] is None and "no labels" in found["note"]
    assert rows(found)[1][0] == "same answer as with all" and not (tmp_path / "o" / "kept.png").exists()
    strange = tmp_path / "strange"
    for name in ("cat", "dog"):
        (strange / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(strange / name / "a.png")
    found = evaluate_tokens(
        VisionEvalConfig(str(place / "model"), str(strange), pictures=0), tmp_path / "o", quiet=True
    )
    assert found["after"]["accuracy"] is None and "named like" in found["note"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.0}, "keep is 0.0: the share to keep"),
        ({"keep": None, "sparsity": 1.0}, "sparsity is 1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tokens": "tpm"}, "no token reducer is named 'tpm'.*zero_tprune"),
        ({"data": "nothing"}, "there is no folder"),
    ],
)
def test_what_cannot_be_is_said(changes, message, place, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate_tokens(options(place, **changes), tmp_path / "o", quiet=True)
    assert not (tmp_path / "o").exists()


def test_a_folder_of_something_else_is_not_replaced(place):
    with pytest.raises(ValueError, match=r"holds no predictions\.jsonl of such a run: choose another --out"):
        evaluate_tokens(options(place), place / "pictures", quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, place, tmp_path):
    found = evaluate_tokens(options(place, tokens=name, keep=0.8), tmp_path / "o", quiet=True)
    assert found["after"]["share"] <= 0.8 and found["after"]["macs"] < found["before"]["macs"]


@pytest.mark.slow
def test_the_command(place, tmp_path):
    command = [
        sys.executable,
        "-m",
        "jprune",
        "eval",
        "--model",
        str(place / "model"),
        "--data",
        str(place / "flat"),
    ]
    run = subprocess.run([*command, "--out", str(tmp_path / "o")], capture_output=True, text=True)
    assert run.returncode == 0 and "GMACs an image" in run.stdout and "kept.png" in run.stdout, run.stderr
    run = subprocess.run([*command, "--keep", "2"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: keep is 2") and "Traceback" not in run.stderr
