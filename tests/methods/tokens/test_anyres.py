"""The layout of LLaVA-1.6's tokens: counts by hand, the map by loops, transformers' own functions."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.peers import peer
from jprune.methods.tokens.anyres import anyres_count, anyres_shape, anyres_tokens, best_grid, unpadded
from jprune.methods.tokens.divprune import divprune_select, retained_count


def test_counts_by_hand():
    # a square: 2 x 2 tiles, no padding; 2 : 1 fills 336 x 672; 640 x 480 loses padding from a square grid
    assert best_grid(1000, 1000) == (672, 672) and anyres_count(1000, 1000) == 576 + 48 * 49
    assert best_grid(300, 600) == (336, 672) and anyres_count(300, 600) == 576 + 24 * 49
    assert best_grid(480, 640) == (672, 672) and anyres_shape(480, 640) == (36, 48)
    assert anyres_count(480, 640) == 576 + 36 * 49
    assert anyres_count(640, 480) == 576 + 48 * 37
    assert best_grid(100, 1000) == (336, 1008)
    # 72 columns, 7.2 rows of image: 8 stay, since padding of an odd number of rows is cut by the smaller half
    assert anyres_shape(100, 1000) == (8, 72)
    with pytest.raises(ValueError, match="give a real size"):
        best_grid(0, 10)


def test_padding_is_cut_evenly():
    assert unpadded(24, 48, 300, 900) == (slice(4, 20), slice(0, 48))
    assert unpadded(24, 24, 900, 300) == (slice(0, 24), slice(8, 16))
    assert unpadded(24, 48, 10, 20) == (slice(0, 24), slice(0, 48))


def test_the_map_is_read_row_by_row_over_tiles():
    side, pins = 4, ((8, 8), (8, 16), (16, 8))
    rng = np.random.default_rng(0)
    base, tiles, newline = (rng.normal(size=s).astype(np.float32) for s in ((16, 2), (2, 16, 2), (2,)))
    got = anyres_tokens(*map(jnp.asarray, (base, tiles, newline)), 6, 16, pins, tile=8)
    want = list(base)
    for r in range(4):  # three rows of image: the fourth is left too
        for t in range(2):
            want += [tiles[t, r * side + c] for c in range(side)]
        want.append(newline)
    np.testing.assert_array_equal(got, np.stack(want))
    assert len(want) == anyres_count(6, 16, pins, tile=8, side=4)
    with pytest.raises(ValueError, match="1x2 tiles"):
        anyres_tokens(*map(jnp.asarray, (base, tiles[:1], newline)), 6, 16, pins, tile=8)


def test_newlines_are_never_chosen_twice():
    rng = np.random.default_rng(0)
    base, tiles, newline = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 6), (4, 16, 6), (6,)))
    tokens = anyres_tokens(base, tiles, newline, 10, 10, ((16, 16),), tile=8)
    k = retained_count(len(tokens), 0.92)  # as many as there are different tokens
    order = divprune_select(tokens, k).order.tolist()
    assert len(tokens) == 16 + 8 * 9 and len(set(order)) == k == 81
    assert sum(i >= 16 and (i - 16) % 9 == 8 for i in order) == 1


@pytest.mark.reference
def test_transformers_lays_out_the_same():
    torch, tf = peer("torch"), peer("transformers")
    theirs = tf.models.llava_next.modeling_llava_next
    rng = np.random.default_rng(0)
    pins = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    for height, width in rng.integers(20, 2000, (200, 2)).tolist():
        assert best_grid(height, width) == tuple(theirs.select_best_resolution((height, width), pins))
        down, across = theirs.get_anyres_image_grid_shape((height, width), pins, 336)
        left = theirs.unpad_image(torch.zeros(1, down * 24, across * 24), (height, width))
        assert tuple(left.shape[1:]) == anyres_shape(height, width), (height, width)
