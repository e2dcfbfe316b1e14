"""A layer's experts spread over devices by what each has to do, and the hook that computes them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from jprune.methods.experts.fewer import reorder_experts, spread_by_load
from jprune.models.moe.blockffn import Experts, refuse_gate
from jprune.models.moe.routers import Routed
from pallas_kernels.sparse_moe import expert_parallel_moe, tile_moe


def spread_experts(params: Mapping[str, Any], load: Any, devices: int) -> tuple[dict[str, Any], float]:
    """(the layer with its experts in the order of `spread_by_load`, the largest device's load over the mean one).

    The layer's outputs stay. A mesh axis of so many devices then holds equally many experts each, and BlockFFN, which has no
    loss that balances them, is waited for no longer than the figure says. Stored optimizer states have to follow.

    Args:
      params: of `jprune.models.moe.blockffn`.
      load: of every expert, such as the number of tokens that use it: `routed.active.sum(0)` over some batches.

    Raises:
      ValueError: the devices do not divide the experts, or there are not as many loads.
    """
    experts = params["up"].shape[0]
    if len(load) != experts:
        raise ValueError(f"{len(load)} loads for {experts} experts: wanted one each")
    order, most = spread_by_load(load, devices)
    return reorder_experts(params, order), most


def experts_over(
    mesh: Mesh, axis: str = "expert", data: str | Sequence[str] = (), inner: Callable[..., Any] = tile_moe
) -> Experts:
    """The hook `experts_fn` of a layer whose experts lie over one axis of a mesh; arguments as `expert_parallel_moe` has them.

    The router is small and is computed where its tokens are, over all experts, as its mean square demands.
    Raises ValueError for experts with gates.
    """

    def compute(x: Any, routed: Routed, up: Any, down: Any, gate: Any = None) -> Any:
        refuse_gate(gate)
        return expert_parallel_moe(
            x, routed.scores, routed.active, up, down, mesh=mesh, axis=axis, data=data, inner=inner
        )

    return compute
