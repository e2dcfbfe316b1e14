"""Bounds of mixtures of experts: those of the memory that a decoding step reads, and what no bound may do."""

import json

import pytest

from experiments.benchmarks import sparse_moe_roofline as bounds
from pallas_kernels.sparse_moe import arg_specs


@pytest.mark.parametrize(
    ("spec", "chip", "dense", "union"),
    [("BLOCKFFN_XLARGE", "v5e", 62.7, 18.8), ("BLOCKFFN_2_8B", "v6e", 82, 24.5), ("LARGE", "v5e", 1310, 393)],
)
def test_decoding_is_the_weights_over_the_bandwidth(spec, chip, dense, union):
    layer, peak = getattr(arg_specs, spec), bounds.CHIPS[chip]
    for cost, microseconds in ((bounds.dense(layer, 32), dense), (bounds.union(layer, 32, 0.3), union)):
        assert 1e6 * cost.seconds(peak) == pytest.approx(microseconds, rel=0.02)  # tokens themselves are the rest


def test_bounds_grow_with_what_is_used_and_meet_the_dense_layer_at_all_of_it():
    layer, everything = arg_specs.BLOCKFFN_XLARGE, bounds.Use(1.0, 1.0, 1.0, 1.0)
    assert bounds.tiles(layer, 4096, everything, 256).macs == bounds.dense(layer, 4096).macs
    assert bounds.tiles(layer, 4096, everything, 256, True).macs == 9 / 6 * bounds.dense(layer, 4096, True).macs
    assert bounds.sorted_pairs(layer, 4096, everything, True).macs == 7 / 6 * bounds.dense(layer, 4096, True).macs
    for layer, use in bounds.LAYERS.items():
        assert use.token <= use.part <= use.tile and use.token <= use.few
        for gradients in (False, True):
            less, more = (
                (bounds.tiles(layer, 4096, u, 256, gradients), bounds.sorted_pairs(layer, 4096, u, gradients))
                for u in (use, everything)
            )
            assert all(a.macs <= b.macs and a.bytes <= b.bytes for a, b in zip(less, more, strict=True))


def test_every_layer_and_chip_is_written(tmp_path):
    bounds.main(tmp_path / "r.json")
    r = json.loads((tmp_path / "r.json").read_text())
    assert r["measured"] is False and "prediction" in r["note"]
    for chips in r["results"].values():
        assert set(chips) == set(bounds.CHIPS)
        for row in (x for rows in chips.values() for x in rows.values()):
            assert row["speed_up"] == pytest.approx(row["dense_microseconds"] / row["microseconds"])
            assert row["to_reach"] == pytest.approx(0.7 * row["speed_up"])
