"""The pieces all convolutional models here are made of: convolution + BatchNorm with the usual constants."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON, MOMENTUM = 1e-5, 0.9


def conv(features: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = False, name: str) -> nn.Conv:
    """Square convolution, padded by half its kernel on both sides (as torchvision's models do)."""
    half = kernel // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        [(half, half)] * 2,
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )


def norm(train: bool, name: str, zero_scale: bool = False) -> nn.BatchNorm:
    """BatchNorm; `zero_scale` starts a residual branch at zero."""
    scale = nn.initializers.zeros if zero_scale else nn.initializers.ones
    return nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON, scale_init=scale, name=name)


def max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """Square max pooling with symmetric padding."""
    return nn.max_pool(x, (window,) * 2, (stride,) * 2, [(padding,) * 2] * 2)  # pyright: ignore[reportArgumentType]


def global_average(x: jax.Array) -> jax.Array:
    """Mean over both spatial axes."""
    return jnp.mean(x, axis=(1, 2))


def kernel_width(params: Any, *path: str) -> int:
    """Output width of the convolution or dense layer at this path of a params tree."""
    return int(shape_of(params, *path, "kernel")[-1])


def shape_of(params: Any, *path: str) -> tuple[int, ...]:
    """Shape of a leaf of a params tree; raises ValueError if there is none."""
    leaf = find(params, *path)
    if not hasattr(leaf, "shape"):
        raise ValueError(f"{'/'.join(path)!r} is a {type(leaf).__name__}, not an array; the tree is another model's")
    return tuple(leaf.shape)


def find(params: Any, *path: str) -> Any:
    """A node of a params tree.

    Raises:
      ValueError: the tree does not have it, so it belongs to another model.
    """
    node = params
    for i, key in enumerate(path):
        if not hasattr(node, "keys") or key not in node:
            raise ValueError(
                f"the parameters have no {'/'.join(path[: i + 1])!r}; they belong to another model or config"
            )
        node = node[key]
    return node


def params_of(variables: Any) -> Any:
    """The "params" collection of a variables tree, or the tree itself; raises ValueError if it is no dict."""
    if not hasattr(variables, "keys"):
        raise ValueError(f"the variables are a {type(variables).__name__}; give the dict that init returned")
    return variables.get("params", variables)
