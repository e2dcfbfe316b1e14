"""Fewer experts, or the same ones in another order: pure functions of a layer's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jprune.models.moe.routers import DSMoE, Grin, ReluNorm, Router, TopK


def prune_experts(
    params: Mapping[str, Any], keep: Sequence[int], router: ReluNorm = ReluNorm()
) -> tuple[dict[str, Any], ReluNorm]:
    """(parameters with these experts alone, the router that goes with them).

    The router's mean square runs over all experts: with E' of E the gain grows by sqrt(E / E') and eps by E / E'. The layer is
    then the same for every token that uses none of the others. Without this it is not, even if they never run.

    Args:
      params: of `jprune.models.moe.blockffn`.
      keep: experts, in the order that they are to have.
      router: with the eps that the layer was trained with.

    Raises:
      ValueError: no expert, one twice, or one that there is not.
    """
    experts = params["up"].shape[0]
    index = _checked(keep, experts)
    ratio = experts / len(index)
    new = _taken(params, index)
    if len(index) < experts:
        scale = new["router_norm"]["scale"]
        new["router_norm"] = {"scale": (scale.astype(jnp.float32) * ratio**0.5).astype(scale.dtype)}
    return new, dataclasses.replace(router, eps=router.eps * ratio)


def take_experts(params: Mapping[str, Any], keep: Sequence[int], router: Router) -> tuple[dict[str, Any], Router]:
    """(parameters with these experts alone, the router that goes with them), whatever the router.

    Where weights are divided by their sum (`TopK`), a token whose experts all stay gets exactly what it got. With
    `ReluNorm` this is `prune_experts`.

    Raises:
      ValueError: no expert, one twice, one that there is not, or fewer than a token goes to.
    """
    if isinstance(router, ReluNorm):
        return prune_experts(params, keep, router)
    index = _checked(keep, params["up"].shape[0])
    if isinstance(router, DSMoE) and list(index[: router.shared]) != list(range(router.shared)):
        raise ValueError(f"the first {router.shared} experts always run: keep them, in their places")
    if isinstance(router, TopK | DSMoE | Grin) and len(index) < router.k:
        raise ValueError(f"{len(index)} experts stay, but a token goes to {router.k}: keep at least so many")
    return _taken(params, index), router


def reorder_experts(params: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The same layer with its experts in another order: the outputs stay, up to the rounding of sums.

    Raises:
      ValueError: not every expert once.
    """
    experts = params["up"].shape[0]
    index = _checked(order, experts)
    if len(index) != experts:
        raise ValueError(f"the order names {len(index)} of {experts} experts: it is an order of all of them")
    return _taken(params, index)


def spread_by_load(load: Any, devices: int) -> tuple[list[int], float]:
    """(an order of the experts in which every device's share comes one after the other, the largest load over the mean one).

    Equally many experts for every device; the heaviest first, each to the device that has least so far. Host-side.

        >>> spread_by_load([5.0, 1.0, 4.0, 2.0], 2)
        ([0, 1, 2, 3], 1.0)

    Raises:
      ValueError: the devices do not divide the experts.
    """
    load = np.asarray(load, float)
    if devices < 1 or len(load) % devices:
        raise ValueError(f"{devices} devices do not divide {len(load)} experts")
    room = len(load) // devices
    shares: list[list[int]] = [[] for _ in range(devices)]
    sums = np.zeros(devices)
    for e in np.argsort(-load, kind="stable"):
        open_ = [d for d in range(devices) if len(shares[d]) < room]
        best = min(open_, key=lambda d: (sums[d], d))
        shares[best].append(int(e))
        sums[best] += load[e]
    return [e for share in shares for e in share], float(sums.max() / max(sums.mean(), 1e-30))


def _taken(params: Mapping[str, Any], index: Any) -> dict[str, Any]:
    new = {
        **params,
        "router": {**params["router"], "kernel": params["router"]["kernel"][:, index]},
        "up": params["up"][index],
        "down": params["down"][index],
    }
    if "gate" in params:
        new["gate"] = params["gate"][index]
    if "router_norm" in params:
        new["router_norm"] = {"scale": params["router_norm"]["scale"][index]}
    return new


def _checked(keep: Sequence[int], experts: int) -> np.ndarray:
    index = np.asarray(keep)
    if (
        index.ndim != 1
        or not len(index)
        or len(np.unique(index)) != len(index)
        or index.min() < 0
        or index.max() >= experts
    ):
        raise ValueError(f"experts {list(keep)}: name at least one, each once, from 0 to {experts - 1}")
    return index
