"""Kept patches stay as they are, the others fade."""

import numpy as np
import pytest

from jprune.tokens.picture import draw_kept


def test_pictures_of_kept_tokens():
    image = np.full((5, 6, 3), 224, np.uint8)
    got = draw_kept(image, np.array([0, 5, -1, 6]), (2, 3))
    assert (got[:3, :2] == 224).all() and (got[3:, 4:] == 224).all()  # three of five rows are the upper patches'
    assert (got[:3, 2:] == 64).all() and (got[3:, :4] == 64).all()
    grey = draw_kept(image[..., 0], [1], (1, 2), dim=0)
    assert grey.shape == (5, 6, 3) and (grey[:, :3] == 24).all() and (grey[:, 3:] == 224).all()
    for bad, said in (
        ((image[..., :2], [0], (2, 3)), "give .height, width"),
        ((image, [0], (6, 3)), "6x3 patches do not fit"),
        ((image, [0], (2, 3), 2.0), "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            draw_kept(*bad)
