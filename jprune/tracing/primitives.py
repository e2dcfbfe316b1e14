"""Primitives by what they do, for all who read a jaxpr: each set is written down here and nowhere else."""

from __future__ import annotations

# matrix products and convolutions in which all rows meet the same weights, and those in which runs of rows do
DENSE_CONTRACTIONS = ("dot_general", "conv_general_dilated")
CONTRACTIONS = (*DENSE_CONTRACTIONS, "ragged_dot_general")

SUMS = ("add", "add_any")  # of two values, neither of them negated

# the result's entries are the operand's own, rounded or placed elsewhere at the most
SAME = (
    "convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient", "optimization_barrier",
    "sharding_constraint", "name", "device_put", "pvary", "pcast", "layout_constraint", "reshard", "mesh_cast",
)  # fmt: skip

# equations that only evaluate another jaxpr: {primitive: the parameter that holds it}
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_vmap_call": "call",  # its own rule for vmap was asked when the function was traced
    "composite": "jaxpr",
}
REMAT = ("remat2", "remat", "checkpoint")  # calls that are evaluated again for the derivative
