"""Token reducers by name, each made for a share of the MACs of a model of given sizes."""

from __future__ import annotations

from collections.abc import Callable

from jprune.methods.tokens.before_first_block import AtEntry
from jprune.methods.tokens.cost import Dims
from jprune.methods.tokens.schedules import ats_for, deit_variances, entry_for, schedule_for, tome_for, topk_for
from jprune.models.token_hook import TokenReducer

METHODS: dict[str, Callable[[float, Dims], TokenReducer]] = {
    "zero_tprune": lambda f, d: schedule_for(f, d, vhf=deit_variances(d)),
    "zero_tprune_uni": lambda f, d: schedule_for(f, d, boost=False, vhf=deit_variances(d)),
    "tome": tome_for,
    "ats": ats_for,
    "evit": lambda f, d: topk_for(f, d, "cls", fused=True),
    "cls_topk": lambda f, d: topk_for(f, d, "cls"),
    "column_mean": lambda f, d: topk_for(f, d, "column", inside=False),
    "random": lambda f, d: topk_for(f, d, "random", inside=False),
    "divprune": lambda f, d: AtEntry("divprune", entry_for(f, d)),
    "random_entry": lambda f, d: AtEntry("random", entry_for(f, d)),
    "norm_entry": lambda f, d: AtEntry("norm", entry_for(f, d)),
    "grid_entry": lambda f, d: AtEntry("grid", entry_for(f, d)),
}


ABOUT = {
    "zero_tprune": "PageRank of the attention graph, after near-duplicates are gone (Zero-TPrune)",
    "zero_tprune_uni": "the same, all tokens voting alike at first",
    "tome": "similar tokens merged in every block (ToMe)",
    "ats": "tokens sampled by their share of the class token's attention (ATS)",
    "evit": "most attended by the class token, the others fused into one (EViT)",
    "cls_topk": "most attended by the class token",
    "column_mean": "most attended by all tokens",
    "random": "drawn, after the same blocks",
    "divprune": "those that differ most, before the first block (DivPrune)",
    "random_entry": "drawn, before the first block",
    "norm_entry": "largest norm, before the first block",
    "grid_entry": "evenly spaced, before the first block",
}


def reducer_for(name: str, fraction: float, dims: Dims) -> TokenReducer:
    """The method that leaves this share of the unreduced blocks' MACs; "random*" needs a key in the model.

    Raises:
      ValueError: an unknown name, a budget outside (0, 1] or out of the method's reach, a model without the class token it needs.
    """
    if name not in METHODS:
        raise ValueError(f"no token reducer is named {name!r}: there are {', '.join(METHODS)}")
    reducer = METHODS[name](fraction, dims)
    if reducer.needs_class_token and not dims.prefix:
        without = [n for n in ("zero_tprune", "tome", "column_mean") if n != name]
        raise ValueError(f"{name} looks at the class token, and this model has none: use {', '.join(without)}")
    return reducer
