"""Kept patches stay as they are, the others fade."""

import numpy as np
import pytest

from jprune.report.kept_patches import FOG, draw_kept


def test_pictures_of_kept_tokens():
    image = np.full((5, 6, 3), 224, np.uint8)
    got = draw_kept(image, np.array([0, 5, -1, 6]), (2, 3))
    assert (got[:3, :2] == 224).all() and (got[3:, 4:] == 224).all()  # three of five rows are the upper patches'
    faded = [round(c + 0.2 * (224 - c)) for c in FOG]
    assert (got[:3, 2:] == faded).all() and (got[3:, :4] == faded).all()
    grey = draw_kept(image[..., 0], [1], (1, 2), dim=0)
    assert grey.shape == (5, 6, 3) and (grey[:, :3] == FOG).all() and (grey[:, 3:] == 224).all()
    for bad, said in (
        ((image[..., :2], [0], (2, 3)), "give .height, width"),
        ((image, [0], (6, 3)), "6x3 patches do not fit"),
        ((image, [0], (2, 3), 2.0), "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            draw_kept(*bad)
