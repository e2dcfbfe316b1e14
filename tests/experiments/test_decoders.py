"""The experiments on decoders, on a model so small that it need not learn: they run from end to end, and demands can fail."""

import functools

import pytest

from experiments import adapted_decoder, cfsp, loraprune, pruned_decoder, stdlib_lm
from experiments.record import over_seeds
from jprune.models.llama import llama_config

CONFIG = llama_config(vocab=256, stream=16, ffn=24, depth=3, q_heads=2, tied=True)
BASE = functools.partial(
    stdlib_lm.base_model, config=CONFIG, recipe=stdlib_lm.Recipe(steps=2, batch=2, tokens=24, warmup=1)
)


@pytest.mark.slow
def test_loraprune(tmp_path, monkeypatch):
    monkeypatch.setenv("JPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(adapted_decoder, "base_model", BASE)
    monkeypatch.setattr(adapted_decoder, "MODEL", CONFIG)
    small = "--tuning.steps 4 --options.every 1 --options.skip-last 0 --batch 2 --tokens 24 --evaluated 4 --agreement 0"
    stored = loraprune.STUDY.main(["--seeds", "0", "--out", str(tmp_path / "l.json"), *small.split()])
    rows = stored["seeds"]["0"]
    assert {k[0] for k in loraprune.STUDY.rows(loraprune.Setting())} == set(rows)
    assert rows["dense"] > 1 and stored["results"]["dense"]["mean"] == rows["dense"]
    for name, row in rows.items():
        if name != "dense":
            assert row["excess"] == pytest.approx(row["perplexity"] / rows["dense"] - 1)
            assert sum(row["gone"].values()) == 2 * (12 + 1), name  # of each of two layers half the channels, one head
    assert rows["lora"]["sliced_perplexity"] == pytest.approx(rows["lora"]["perplexity"], rel=1e-5)
    assert set(stored["agreement"]) == {"lora", "grad", "magnitude"}
    assert all(-1 <= r["mean"] <= 1 for r in stored["agreement"].values())
    assert all(
        m["gradients of weights"]["lora"] == 0 < m["gradients of weights"]["grad"] for m in stored["memory"].values()
    )


def test_demands_of_loraprune_can_fail():
    def judged(share=0.6, gradients=0, sliced=5.0, **excess):
        rows = {"lora": 0.1, "grad": 0.1, "magnitude": 0.2, "random": 0.3} | excess
        seed = {name: {"excess": x, "perplexity": 5.0, "sliced_perplexity": sliced} for name, x in rows.items()}
        memory = {"accumulating": {"lora": share, "grad": 1.0}, "gradients of weights": {"lora": gradients}}
        d = loraprune.demands({"results": over_seeds([seed]), "memory": {"unrolled": memory, "scanned": memory}})
        return [i for i, x in enumerate(d.values()) if not x.holds]

    assert judged() == []
    assert judged(magnitude=0.105) == [0] and judged(random=0.15) == [1] and judged(grad=0.09) == [2]
    assert judged(share=0.8) == [3, 4] and judged(gradients=1) == [5] and judged(sliced=5.1) == [6]


@pytest.mark.slow
def test_cfsp(tmp_path, monkeypatch):
    monkeypatch.setenv("JPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pruned_decoder.stdlib_lm, "base_model", BASE)
    small = "--sparsities 0.25 0.5 --tuning.steps 2 --tuning-rows 2 --gradient-windows 2 --slopes 4"
    out = tmp_path / "c.json"
    rows = [
        "official coarse",
        "official uniform",
        "flap with biases",
        "taylor heads",
        "wanda in turn",
        "dense",
        cfsp.RANKED,
    ]
    stored = cfsp.STUDY.main(["--seeds", "0", "--out", str(out), "--rows", *rows, "model", *small.split()])
    seed = stored["seeds"]["0"]
    assert len(seed["model"]["importance"]) == 3 and stored["results"]["model"]["perplexity"]["mean"] > 1
    assert set(seed) == {"model", "0.25", "0.5"} and seed["0.25"]["dense"] == seed["0.5"]["dense"]
    for p in ("0.25", "0.5"):
        assert set(seed[p]) == set(rows) and seed[p]["dense"]["excess"] == 0
        for name, row in seed[p].items():
            assert ("recovered" in row) == (name in {*cfsp.TUNED, "dense"}), name
        assert sum(seed[p]["official coarse"]["widths"]) == sum(seed[p]["official uniform"]["widths"])
        assert seed[p][cfsp.RANKED]["excess"] == seed[p]["official coarse"]["excess"]


def test_a_configuration_for_folders_asks_for_them(tmp_path):
    for _ in range(2):  # a refused run leaves nothing that the next one would take up
        with pytest.raises(ValueError, match="needs --model, --text and --eval-text"):
            cfsp.STUDY.main(["--config", "paper", "--out", str(tmp_path / "c.json")])
        assert not list(tmp_path.iterdir())


def test_demands_of_cfsp_can_fail():
    names = {k[-1] for k in cfsp.STUDY.rows(cfsp.SETTINGS["small"])} - {"model"}

    def judged(**half):
        excess = {name: 0.1 for name in names} | {"official coarse": 0.02, "random coarse": 0.04} | half
        rows = {name: {"excess": x} for name, x in excess.items()}
        d = cfsp.demands(
            {
                "results": over_seeds(
                    [{"model": {"perplexity": 5.0}, "0.5": rows, "0.2": {"official coarse": {"excess": 0.01}}}]
                )
            }
        )
        return [i for i, x in enumerate(d.values()) if not x.holds]

    assert judged() == []
    assert judged(**{"official uniform": 0.022, "wanda uniform": 0.021}) == [0, 1]
    assert judged(**{"wanda global": 0.021, "magnitude uniform": 0.07}) == [2, 3]
    assert judged(**{"random uniform": 0.06}) == [4, 6]
