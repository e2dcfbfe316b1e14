"""The one table of methods by name, and of what reduces tokens: what `jprune list` shows and `--method` understands."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from jprune.methods.channels import for_classifiers, for_decoders
from jprune.methods.contract import Method
from jprune.methods.experts import for_decoders as experts
from jprune.methods.tokens import llava_answer, reducers_by_name
from jprune.methods.weights import methods as weights

METHODS: Mapping[str, Mapping[str, Method]] = {
    kind: {m.name: m for m in methods}
    for kind, methods in (
        ("classifiers", (*for_classifiers.METHODS, *weights.FOR_CLASSIFIERS)),
        ("decoders", (*for_decoders.METHODS, *weights.FOR_DECODERS, *experts.METHODS)),
    )
}


def _listed(models: str, removes: str) -> dict[str, str]:
    return {n: m.about for n, m in METHODS[models].items() if m.removes == removes}


TABLE: Mapping[str, Mapping[str, str]] = {
    "channels of a classifier (jprune prune)": _listed("classifiers", "channels"),
    "channels and heads of a language model (jprune prune --model FOLDER)": _listed("decoders", "channels"),
    "single weights of a classifier or a language model (jprune prune)": _listed("decoders", "weights"),
    "whole experts of a language model (jprune prune --model FOLDER)": _listed("decoders", "experts"),
    "tokens of a vision transformer (jprune eval)": reducers_by_name.ABOUT,
    "visual tokens of a LLaVA (jprune chat)": llava_answer.ABOUT,
}


def method(name: str, models: str = "classifiers") -> Method:
    """The method of that name for that kind of model.

        >>> method("taylor").about
        '|weight x gradient|'

    Raises:
      ValueError: an unknown name (with the nearest ones), or one for another kind of model.
    """
    mine = METHODS[models]
    if name in mine:
        return mine[name]
    other = next((kind for kind, methods in METHODS.items() if name in methods), None)
    if other is not None:
        raise ValueError(f"method {name!r} is for {other}, not for {models}: choose one of {', '.join(mine)}")
    near = difflib.get_close_matches(name, mine, n=3) or sorted(mine)
    raise ValueError(f"no method {name!r} for {models}: did you mean {', '.join(near)}?")
