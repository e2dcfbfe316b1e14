"""Light convolutions beside a convolution: same input, same output shape, a fraction of its MACs.

    pw       BatchNorm(1x1 convolution)                        1 / window
    dw       BatchNorm(depthwise convolution)                  1 / the smaller number of channels
    lowrank  BatchNorm(1x1 (window convolution to rank r))     about r / output channels

A depthwise convolution with more outputs than inputs repeats inputs, one with fewer sums neighbouring ones. Kernels
lie in the layout of the convolution they accompany, whatever that is; BatchNorm uses the statistics of the
batch in training and running ones in evaluation.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jprune.surgery.sites import Site

KINDS = ("pw", "dw", "lowrank", "none")
EPSILON, MOMENTUM = 1e-5, 0.9


def init(key: jax.Array, site: Site, kind: str, scale: float = 1.0) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """(parameters, running statistics): He-normal kernels, BatchNorm scale `scale`; empty for "none".

    Raises:
      ValueError: unknown kind, or a convolution that this kind cannot accompany.
    """
    check(site, kind)
    if kind == "none":
        return {}, {}
    first, second = jax.random.split(key)
    shape = _kernel_shape(site, kind)
    params = {"kernel": _he(first, site, shape)}
    if kind == "lowrank":
        mix = _shape(site, _rank(site), site.width, (1,) * len(site.window))
        params["mix"] = _he(second, site, mix)
    n = site.width
    params |= {"scale": jnp.full(n, scale, jnp.float32), "bias": jnp.zeros(n, jnp.float32)}
    return params, {"mean": jnp.zeros(n, jnp.float32), "var": jnp.ones(n, jnp.float32)}


def check(site: Site, kind: str) -> None:
    """Raise ValueError if this kind of bypass cannot accompany this convolution."""
    if kind not in KINDS:
        raise ValueError(f"the bypass must be one of {KINDS}, not {kind!r}")
    p = site.eqn.params
    few, many = sorted((_inputs(site), site.width))
    if kind != "none" and any(d != 1 for d in p["lhs_dilation"]):
        raise ValueError(
            f"{site.leaf!r} belongs to a transposed convolution, which no bypass accompanies: leave it out"
        )
    if kind == "dw" and many % few:
        raise ValueError(f"{site.leaf!r} makes {site.width} channels of {_inputs(site)}: a depthwise bypass needs a multiple; "
                         "use bypass='pw' or 'lowrank'")  # fmt: skip


def apply(site: Site, kind: str, params: Any, stats: Any, x: jax.Array, train: bool) -> tuple[Any, dict[str, Any]]:
    """(the bypass of x, or 0; its new running statistics)."""
    if kind == "none":
        return 0.0, {}
    if kind == "lowrank":
        y = _conv(site, x, params["kernel"])
        y = _conv(site, y, params["mix"], plain=True)
    else:
        y = _conv(site, x, params["kernel"], groups=_groups(site, kind), point=kind == "pw")
    axes = tuple(i for i in range(y.ndim) if i != site.channel)
    shape = [1] * y.ndim
    shape[site.channel] = site.width
    y32, mean, var, new = y.astype(jnp.float32), stats["mean"], stats["var"], {}
    if train:
        mean, var = y32.mean(axes), y32.var(axes)
        new = {
            k: MOMENTUM * stats[k] + (1 - MOMENTUM) * lax.stop_gradient(v) for k, v in (("mean", mean), ("var", var))
        }
    factor = params["scale"] * lax.rsqrt(var + EPSILON)
    out = (y32 - mean.reshape(shape)) * factor.reshape(shape) + params["bias"].reshape(shape)
    return out.astype(y.dtype), new


def as_kernel(site: Site, kind: str, params: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
    """(kernel of the site's own shape, bias (channels,)) that compute the same as the bypass in evaluation mode.

    Raises:
      ValueError: a kind that is not one convolution.
    """
    if kind not in ("pw", "dw"):
        raise ValueError(f"only a 'pw' or 'dw' bypass is one convolution, not {kind!r}")
    spec = site.eqn.params["dimension_numbers"].rhs_spec
    factor = params["scale"] * lax.rsqrt(stats["var"] + EPSILON)
    kernel = jnp.transpose(params["kernel"], (*spec[2:], spec[1], spec[0])) * factor  # (window.., in, out)
    inputs, groups = _inputs(site), _groups(site, kind)
    if kind == "pw":
        centre = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in site.window]
        kernel = jnp.pad(kernel, (*centre, (0, 0), (0, 0)))
    else:
        group = jnp.arange(site.width) // (site.width // groups)
        kernel = jnp.tile(kernel, (*[1] * len(site.window), groups, 1))
        kernel = kernel * (jnp.arange(inputs)[:, None] // (inputs // groups) == group)
    order = [0] * kernel.ndim
    for k, axis in enumerate((*spec[2:], spec[1], spec[0])):
        order[axis] = k
    return jnp.transpose(kernel, order), params["bias"] - stats["mean"] * factor


def convolve(site: Site, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The site's own convolution with another kernel of its shape."""
    return _conv(site, x, kernel)


def _inputs(site: Site) -> int:
    p = site.eqn.params
    return site.kernel_shape[p["dimension_numbers"].rhs_spec[1]] * p["feature_group_count"]


def _groups(site: Site, kind: str) -> int:
    return min(_inputs(site), site.width) if kind == "dw" else site.eqn.params["feature_group_count"]


def _rank(site: Site) -> int:
    return max(1, site.width // 16)


def _shape(site: Site, inputs: int, outputs: int, window: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel's shape in the site's layout."""
    spec = site.eqn.params["dimension_numbers"].rhs_spec
    out = [0] * len(spec)
    for axis, n in zip(spec, (outputs, inputs, *window), strict=True):
        out[axis] = n
    return tuple(out)


def _kernel_shape(site: Site, kind: str) -> tuple[int, ...]:
    inside = _inputs(site) // _groups(site, kind)
    window = (1,) * len(site.window) if kind == "pw" else site.window
    return _shape(site, inside, _rank(site) if kind == "lowrank" else site.width, window)


def _he(key: jax.Array, site: Site, shape: tuple[int, ...]) -> jax.Array:
    fan_in = math.prod(shape) / shape[site.kernel_out]
    return jax.random.normal(key, shape, jnp.float32) * math.sqrt(2.0 / fan_in)


def _conv(site: Site, x: Any, kernel: Any, groups: int | None = None, point: bool = False, plain: bool = False) -> Any:
    """The site's convolution with another kernel; `point`: through the window's centre; `plain`: 1x1 on its result."""
    p = site.eqn.params
    dn = p["dimension_numbers"]
    if plain:
        dn = lax.ConvDimensionNumbers(dn.out_spec, dn.rhs_spec, dn.out_spec)
        return lax.conv_general_dilated(x, kernel.astype(x.dtype), (1,) * len(site.window), "VALID",
                                        dimension_numbers=dn)  # fmt: skip
    padding, dilation = p["padding"], p["rhs_dilation"]
    if point:
        sizes = [x.shape[i] for i in dn.lhs_spec[2:]]
        wanted = [site.eqn.outvars[0].aval.shape[i] for i in dn.out_spec[2:]]
        padding = [
            _centred(*args)
            for args in zip(padding, site.window, dilation, p["window_strides"], sizes, wanted, strict=True)
        ]
        dilation = (1,) * len(site.window)
    groups = int(p["feature_group_count"] if groups is None else groups)
    return lax.conv_general_dilated(x, kernel.astype(x.dtype), p["window_strides"], padding, rhs_dilation=dilation,
                                    dimension_numbers=dn, feature_group_count=groups)  # fmt: skip


def _centred(pad: tuple[int, int], k: int, d: int, stride: int, size: int, wanted: int) -> tuple[int, int]:
    """Padding with which a 1-wide window meets what the centre of the k-wide one meets."""
    low = pad[0] - d * ((k - 1) // 2)
    high = (wanted - 1) * stride + 1 - size - low
    return low, 0 if high < 0 and (size + low - 1) // stride + 1 == wanted else high
