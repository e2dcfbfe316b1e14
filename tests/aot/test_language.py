"""Calibration of decoders with billions of parameters is accepted by the TPU's compiler and fits its memory."""

import json

import pytest

from pallas_kernels.common import aot_tpu as aot

aot.prepare()

from experiments.benchmarks import language_scale as scale  # noqa: E402

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="libtpu is not installed")]
ON = scale.Slice()


def divided(c, parts):
    """Bytes of bfloat16 weights on one of `parts` devices: attention and MLP divided, the rest not, no head at all."""
    q, kv = c.q_heads[0] * c.head_dim, c.kv_heads[0] * c.head_dim
    layer = c.stream * (2 * q + 2 * kv + 3 * c.ffn[0])
    return 2 * (c.depth * (layer / parts + 2 * c.stream) + c.vocab * c.stream)


@pytest.mark.parametrize("name", scale.SHAPES)
def test_a_step_of_the_whole_model_compiles_for_sixteen_chips(name):
    found = scale.whole(scale.SHAPES[name], ON)
    assert found["params"] == {"Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248}[name]
    rest = found["chip_bytes"]["arguments"] - divided(scale.SHAPES[name], ON.model)
    assert 0 < rest < 2 * found["statistics_bytes"] + 2**21  # states, ids, and what the layout of arrays pads
    assert found["collectives"]["all-reduce"] > 0
    assert all(scale.checks({name: found}, ON).values())


def test_a_layer_of_seventy_billion_parameters_compiles_for_one_chip():
    (name,) = scale.LAYERWISE
    found = scale.layerwise(scale.LAYERWISE[name], ON)
    assert found["params"] == 68_976_648_192 and found["collectives"] == {}
    one = 2 * (8192 * (2 * 8192 + 2 * 1024 + 3 * 28672) + 2 * 8192)
    assert one < found["chip_bytes"]["arguments"] < 1.05 * one + ON.streams * ON.tokens * 8192 * 2
    assert all(scale.checks({name: found}, ON).values())


def test_checks_can_fail():
    fine = {"weights_bytes": 8e9, "statistics_bytes": 10, "gathered_bytes": 10,
            "chip_bytes": {"arguments": 1e9, "temporary": 1e9}}  # fmt: skip
    assert list(scale.checks({"m": fine}, ON).values()) == [True, True, True]
    bad = fine | {"gathered_bytes": 11, "chip_bytes": {"arguments": 3e9, "temporary": 12e9}}
    assert list(scale.checks({"m": bad}, ON).values()) == [False, False, False]
    assert list(scale.checks({"m": fine | {"streams_bytes": 16e9}}, ON).values()) == [False]
    text = "x = (f32[2,3]{1,0}, bf16[4,5,6]{2,1,0}) all-gather-start(y)\n z = f32[99]{0} all-reduce(y)\n"
    assert scale.gathered(text) == 240 and scale.gathered("") == 0


def test_the_stored_results_say_what_the_checks_say():
    stored = json.loads((scale.RESULTS / "language-scale.json").read_text())
    assert scale.checks(stored["results"], scale.Slice(**stored["setting"])) == stored["checks"]
    assert set(stored["results"]) == {*scale.SHAPES, *scale.LAYERWISE} and all(stored["checks"].values())
