"""The run-time check of shape annotations is on, and looks only where shapes are promised."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from jprune.training.loss import cross_entropy


def test_a_wrong_shape_is_noticed():
    logits, labels = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)
    assert cross_entropy(logits, labels).shape == (4,)
    with pytest.raises(TypeCheckError, match="labels"):
        cross_entropy(logits, labels[:3])
    with pytest.raises(TypeCheckError, match="labels"):
        cross_entropy(logits, labels.astype(jnp.float32))
