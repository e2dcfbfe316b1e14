"""The search of schedules: draws keep to the budget, hiding scores as dropping does, and a stopped search goes on."""

import functools
import json

import jax
import numpy as np
import pytest
from quickly import quickly
from small_vit import case
from small_vit import dims as sizes

from jprune.methods.tokens.cost import count_macs, deit
from jprune.methods.tokens.search import SearchSpace, as_data, draw, from_data, search_schedule
from jprune.methods.tokens.zero_tprune import ZeroTPrune
from jprune.models.token_hook import TokenReducer

COARSE = SearchSpace(blocks=(1, 2), iters=(1, 2), variances=(None, (0.2, 2.0)))
FRACTION = 0.7


def dims():
    """Of a model of two blocks."""
    return sizes("shallow")


@functools.cache
def data():
    """(calibration, held out): images with the unreduced model's answers as labels."""
    module, variables, _ = case("shallow")
    images = np.random.default_rng(5).normal(size=(12, 16, 20, 3)).astype(np.float32)
    answer = quickly(module.apply)
    labels = np.asarray(answer(variables, images)).argmax(-1)
    return (images[:8], labels[:8]), (images[8:], labels[8:])


class Model:
    """apply of a search; counts how often it is traced, by the kind of reducer."""

    def __init__(self):
        self.traced = []

    def __call__(self, images, reducer):
        self.traced.append(type(reducer).__name__)
        module, variables, _ = case("shallow")
        return module.apply(variables, images, reducer=reducer)


@functools.cache
def searched(tmp):
    """(found, model) of a search whose log is in the folder."""
    model = Model()
    options = {
        "space": COARSE,
        "trials": 5,
        "few": 4,
        "keep": 2,
        "batch": 4,
        "tolerance": 0.06,
        "log": tmp / "log.jsonl",
        "seed": 3,
    }
    found = search_schedule(model, dims(), FRACTION, *data(), objective="kl", **options)
    return found, model, options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("search")


def test_draws_keep_to_the_budget_and_differ():
    of, space = deit("tiny"), SearchSpace()
    drawn = [draw(space, of, 0.6, 0, i) for i in range(6)]
    assert len({str(as_data(d)) for d in drawn}) == 6
    for one in drawn:
        assert 0.594 <= count_macs(one, of)["fraction"] <= 0.6
        assert 2 <= len(one.specs) <= 6 and one.specs[-1].layer <= 10
        votes = [s.iters for s in one.specs]
        assert votes == sorted(votes, reverse=True) and set(votes) <= {1, 5, 10, 30}
        assert len({s.boost for s in one.specs}) == len({s.vhf for s in one.specs}) == 1
        assert from_data(json.loads(json.dumps(as_data(one)))) == one
    assert draw(space, of, 0.6, 0, 3) == drawn[3] != draw(space, of, 0.6, 1, 3)


def test_search(folder):
    found, model, _ = searched(folder)
    assert len(found) == 2 and found[0].calibration >= found[1].calibration
    assert model.traced.count("Hiding") == 1  # one program for all schedules
    assert model.traced.count("ZeroTPrune") == 2
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    few = {e["trial"]: e["score"] for e in lines[1:] if e["stage"] == "few"}
    assert sorted(few) == list(range(5)) and len(lines) == 1 + 5 + 2 * 2
    assert {f.trial for f in found} == set(sorted(few, key=lambda i: -few[i])[:2])
    module, variables, _ = case("shallow")
    (images, _), (held, _) = data()
    apply = quickly(module.apply, "reducer")

    def divergence(x, reducer):
        p, q = (
            np.asarray(jax.nn.log_softmax(apply(variables, x, reducer=r)), np.float64)
            for r in (TokenReducer(), reducer)
        )
        return (np.exp(p) * (p - q)).sum(-1)

    best = found[0]
    kl = np.concatenate([divergence(images[i : i + 4], best.reducer) for i in (0, 4)])
    assert best.few == pytest.approx(-kl[:4].mean(), rel=1e-3)  # hidden or dropped, it is the same
    assert best.calibration == pytest.approx(-kl.mean(), rel=1e-3)
    assert best.held_out == pytest.approx(-divergence(held, best.reducer).mean(), rel=1e-3)
    assert 0.65 < best.macs["fraction"] <= FRACTION


def test_a_stopped_search_goes_on(folder):
    found, _, options = searched(folder)
    again = Model()
    whole = (folder / "log.jsonl").read_text()
    cut = folder / "cut.jsonl"
    cut.write_text(whole[:-30])  # the last line was being written
    resumed = search_schedule(again, dims(), FRACTION, *data(), objective="kl", **options | {"log": cut})
    assert resumed == found and cut.read_text() == whole
    assert again.traced.count("ZeroTPrune") == 1 and "Hiding" not in again.traced
    with pytest.raises(ValueError, match="log of another search"):
        search_schedule(again, dims(), 0.8, *data(), objective="kl", **options)


@pytest.mark.slow
def test_accuracy(folder):
    _, _, options = searched(folder)
    found = search_schedule(Model(), dims(), 0.9, *data(), **options | {"log": None, "trials": 2, "keep": 1})
    (images, labels), _ = data()
    module, variables, _ = case("shallow")
    apply = quickly(module.apply, "reducer")
    answers = np.asarray(apply(variables, images, reducer=found[0].reducer)).argmax(-1)
    assert found[0].calibration == np.mean(answers == labels) and isinstance(found[0].reducer, ZeroTPrune)


def test_errors():
    images, labels = data()[0]
    with pytest.raises(ValueError, match="objective must be"):
        search_schedule(Model(), dims(), 0.5, (images, labels), objective="loss")
    with pytest.raises(ValueError, match="accuracies need labels"):
        search_schedule(Model(), dims(), 0.5, (images, None))
    with pytest.raises(ValueError, match="share of MACs is 2"):
        draw(SearchSpace(), dims(), 2, 0, 0)
    with pytest.raises(ValueError, match=r"none of 100 schedules leaves 0\.030"):
        draw(SearchSpace(), deit("tiny"), 0.03, 0, 0)
