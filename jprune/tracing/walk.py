"""The abstract walk over a jaxpr: tags and zero flags of every value, equation by equation.

Nothing is computed and nothing is allocated. Each equation's rule (jprune.tracing.rules) unifies the tags of the
axes it ties together, freezes what it cannot follow, and says which results are known to be zero at removed
positions: that is the exactness certificate. Results are kept per call path - never per jaxpr object, which jax
shares between call sites - so that replay, cost and taps find the layouts of exactly this call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from jprune.tracing import refine
from jprune.tracing import tags as T
from jprune.tracing.tags import Frozen, Misaligned, Tag

# Starts a note that leaves replay exact: re-running the model's own Python code would divide by the new width.
DIVISOR = "reconfigure:"

Path: TypeAlias = tuple[int | str, ...]
Eqn: TypeAlias = Any  # jax.extend.core.JaxprEqn
LARGEST_INDEX = 1 << 20  # entries of a constant that is computed to see which positions it names
LAYERS = "layers"  # a step of moves: one layer of a stacked leaf enters the body of a scan
Site: TypeAlias = tuple[Eqn, ...]  # an equation and the calls it lies in, innermost first
Move: TypeAlias = Any  # (equation, number of its result), or LAYERS


@dataclasses.dataclass(slots=True)
class Val:
    """What is known of one traced value.

    Attributes:
      shape, dtype: of the value.
      tags: one tag per axis.
      zero: per axis, whether the value is 0 at positions that pruning removes from that axis.
      scalar: the number every entry equals, where it is a known constant.
      leaf: the parameter leaf these entries come from unchanged (through casts and layout changes only).
      const: the value itself, where it is a folded constant.
      moves: the casts and layout changes between the leaf and this value (see jprune.tracing.operand).
      known: computes the value itself, where it depends on constants alone; nothing is computed before a rule asks.
    """

    shape: tuple[int, ...]
    dtype: Any
    tags: tuple[Tag, ...]
    zero: tuple[bool, ...]
    scalar: float | None = None
    leaf: str | None = None
    const: np.ndarray | None = None
    moves: tuple[Move, ...] = ()
    known: Callable[[], np.ndarray] | None = None

    def flag(self, axis: int, n: int) -> bool:
        """Whether this operand is zero at removed positions of an axis of size n that it may be broadcast along."""
        if self.scalar is not None:
            return self.scalar == 0
        return bool(self.shape) and self.shape[axis] == n and self.zero[axis]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one primitive is followed.

    Attributes:
      propagate: (analysis, equation, operand values) -> result values; unifies, freezes, certifies.
      rewrite: (equation, sizes) -> equation parameters for the pruned sizes; None: parameters hold no sizes.
      evaluate: (evaluator, equation, operands, path) -> results; only for primitives that contain jaxprs.
      perform: (equation, operands, sizes) -> results, or None to bind the primitive with the rewritten parameters; for
        what no parameters of the same primitive say at the pruned sizes.
    """

    propagate: Callable[[Analysis, Eqn, list[Val]], list[Val]]
    rewrite: Callable[[Eqn, Any], dict[str, Any]] | None = None
    evaluate: Callable[[Any, Eqn, list[Any], Path], list[Any]] | None = None
    perform: Callable[[Eqn, list[Any], Any], list[Any] | None] | None = None


@dataclasses.dataclass(slots=True)
class Use:
    """One place where a parameter leaf meets data: the raw material of taps, roles and isomorphism classes."""

    path: Path
    primitive: str
    leaf: str
    leaf_operand: int
    data_operand: int
    role: str
    leaf_tags: tuple[Tag, ...]  # the axes of the leaf operand, and below those that are contracted
    contracted: tuple[Tag, ...]
    data_features: tuple[int, ...]  # axes of the data operand that are indexed by the leaf
    out_features: tuple[int, ...]  # axes of the result that are indexed by the leaf
    site: Site
    moves: tuple[Move, ...]  # from the leaf to the leaf operand

    @property
    def eqn(self) -> Eqn:
        """The equation in which they meet."""
        return self.site[0]

    @property
    def where(self) -> str:
        """The user's source line."""
        return line_of(self.site)


@dataclasses.dataclass(slots=True)
class MacTerm:
    """MACs of one contraction: coefficient times the sizes of these tags."""

    path: Path
    primitive: str
    leaf: str | None
    coefficient: int
    factors: tuple[Tag, ...]
    out_tags: tuple[Tag, ...]
    contracted: tuple[Tag, ...]
    itemsize: int
    site: Site

    @property
    def eqn(self) -> Eqn:
        """The contraction."""
        return self.site[0]

    @property
    def where(self) -> str:
        """The user's source line."""
        return line_of(self.site)


def line_of(site: Site) -> str:
    """The user's source line of an equation, or of the nearest call around it that has one; "" if none has."""
    return next(filter(None, map(user_line, site)), "")


LIBRARIES = ("/site-packages/", "/dist-packages/", os.path.dirname(__file__) + os.sep)  # of arrays, modules, and ours


def user_line(eqn: Eqn) -> str:
    """'file.py:line (function)' of the innermost frame that is not inside an array or module library."""
    traceback = getattr(eqn.source_info, "traceback", None)
    if traceback is None:
        return ""
    for frame in traceback.frames:
        if not frame.file_name.startswith("<") and not any(s in frame.file_name for s in LIBRARIES):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""


class Analysis:
    """State of one walk: the records per call path and what the rules found."""

    def __init__(self, rules: Mapping[str, Rule], fold_constants: bool = False):
        self.rules = rules
        self.fold_constants = fold_constants
        self.records: dict[Path, tuple[list[Val], list[Val]]] = {}
        self.eqns: dict[Path, Eqn] = {}  # those the function itself evaluates: without derivative rules
        self.bodies: dict[Path, tuple[Any, Sequence[Any]]] = {}  # each jaxpr walked, with its constants
        self.folded: dict[Path, list[Val]] = {}
        self.uses: dict[tuple[Path, int], Use] = {}
        self.macs: dict[Path, MacTerm] = {}
        self.unsupported: dict[str, list[str]] = {}
        self.scan_of: dict[Path, T.Atom] = {}  # layer axis of the scan equation at this path
        self.jaxprs: dict[Path, Any] = {}  # jaxprs made on the way (derivative rules), by the path they were walked at
        self.indices: dict[Path, Any] = {}  # what rules knew of constant operands, for replay
        self.mixes_layers: set[Path] = set()  # equations that do more to a layers' axis than to carry it
        self.shadow = False  # walking a derivative rule: sizes count, certificates and costs do not
        self.unseen = False  # no output depends on the equation: it is only printed, or shown to a callback
        self.path: Path = ()
        self.eqn: Eqn = None
        self._callers: list[Eqn] = []
        self._lines: dict[int, str] = {}

    # -- values -------------------------------------------------------------------------------------------------

    def fresh(self, n: int) -> Tag:
        """A new prunable axis (nothing to prune on size 1)."""
        return (T.Atom(n),) if n != 1 else ()

    def fixed(self, n: int, code: str, detail: str = "") -> Tag:
        """A new axis that is unprunable for the given reason."""
        return (T.Atom(n, Frozen(code, detail, self.where)),) if n != 1 else ()

    def value(self, aval: Any, tags: Sequence[Tag], zero: Sequence[bool] | None = None, **known: Any) -> Val:
        """A result with these tags; zero flags default to False."""
        zero = tuple(zero) if zero is not None else (False,) * len(aval.shape)
        return Val(tuple(aval.shape), aval.dtype, tuple(tags), zero, **known)

    def opaque(self, aval: Any, code: str, detail: str = "") -> Val:
        """A result none of whose axes can be pruned."""
        return self.value(aval, [self.fixed(n, code, detail) for n in aval.shape])

    def constant(self, value: Any, code: str = "CONST_CAPTURED", sliceable: bool = False) -> Val:
        """An array the function closes over: frozen, or (when folding, where replay can reach it) sliced."""
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return self.opaque(jax.typeof(value), code)
        if np.ndim(value) == 0:
            return Val((), value.dtype, (), (), scalar=_as_float(value))
        if self.fold_constants and sliceable and not isinstance(value, Tracer):
            return Val(
                np.shape(value),
                value.dtype,
                tuple(self.fresh(n) for n in np.shape(value)),
                (False,) * np.ndim(value),
                const=np.asarray(value),
                known=lambda: np.asarray(value),
            )
        v = self.opaque(value, code)
        v.known = None if isinstance(value, Tracer) else lambda: np.asarray(value)
        return v

    # -- what rules say -----------------------------------------------------------------------------------------

    @property
    def where(self) -> str:
        """The user's source line of the current equation, or of the nearest call around it that has one."""
        for eqn in self._site if self.eqn is not None else ():
            key = id(eqn)
            if key not in self._lines:
                self._lines[key] = user_line(eqn)
            if self._lines[key]:
                return self._lines[key]
        return ""

    @property
    def _site(self) -> Site:
        return (self.eqn, *reversed(self._callers))

    def unify(self, a: Tag, b: Tag, code: str = "MISALIGNED") -> None:
        """Tie two axes; where they have no common pieces both are frozen."""
        try:
            refine.unify(a, b)
        except Misaligned:
            self.freeze(a, code)
            self.freeze(b, code)

    def freeze(self, tag: Tag, code: str, detail: str = "") -> None:
        """Freeze one axis for a reason at the current equation.

        Where it is the layers' axis of a scan, its positions are no longer known to be those of the layers: what meets
        it in this equation must be the same in all of them.
        """
        found = T.atoms(tag)
        where = self.where if any([x.reason is None for x in found]) else ""  # the first reason wins
        T.freeze(tag, Frozen(code, detail, where))
        if self.path and any([x.scan is not None for x in found]):
            self.mixes_layers.add(self.path)

    def freeze_all(self, vals: Sequence[Val], code: str, detail: str = "") -> None:
        """Freeze every axis of these values."""
        for v in vals:
            for t in v.tags:
                self.freeze(t, code, detail)

    def inexact(self, tag: Tag, what: str) -> None:
        """Note that values at removed positions of this axis reach the result through the current equation."""
        if not self.shadow and not self.unseen and T.is_live(tag):
            T.note(tag, f"{what} at {self.where}" if self.where else what)

    def use(
        self,
        vals: Sequence[Val],
        leaf_operand: int,
        data_operand: int,
        role: str,
        contracted: Sequence[Tag],
        data_features: Sequence[int],
        out_features: Sequence[int],
    ) -> None:
        """Record that a leaf meets data here."""
        v = vals[leaf_operand]
        if self.shadow:
            return
        assert v.leaf is not None
        self.uses[self.path, leaf_operand] = Use(
            self.path,
            self.eqn.primitive.name,
            v.leaf,
            leaf_operand,
            data_operand,
            role,
            v.tags,
            tuple(contracted),
            tuple(data_features),
            tuple(out_features),
            self._site,
            v.moves,
        )

    def count(
        self,
        leaf: str | None,
        coefficient: int,
        factors: Sequence[Tag],
        out_tags: Sequence[Tag],
        contracted: Sequence[Tag],
    ) -> None:
        """Record the MACs of the current contraction."""
        if self.shadow:
            return
        itemsize = self.eqn.outvars[0].aval.dtype.itemsize
        self.macs[self.path] = MacTerm(
            self.path,
            self.eqn.primitive.name,
            leaf,
            coefficient,
            tuple(factors),
            tuple(out_tags),
            tuple(contracted),
            itemsize,
            self._site,
        )

    @contextlib.contextmanager
    def in_shadow(self) -> Iterator[None]:
        """Walk the jaxpr of a derivative rule."""
        self.shadow = True
        try:
            yield
        finally:
            self.shadow = False

    # -- the walk -----------------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Val], path: Path) -> list[Val]:
        """Walk one (open) jaxpr on these values and return its results."""
        env: dict[Any, Val] = {}
        self.bodies[path] = (jaxpr, consts)
        for k, (var, c) in enumerate(zip(jaxpr.constvars, consts, strict=True)):
            env[var] = c if isinstance(c, Val) else self._held(c, (*path, "const", k))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any, k: int, at: Path) -> Val:
            return self._held(np.asarray(v.val), (*at, "literal", k)) if isinstance(v, jex.Literal) else env[v]

        needed = _needed(jaxpr)
        outer = self.unseen
        for i, eqn in enumerate(jaxpr.eqns):
            self.unseen = outer or not needed[i]
            here = (*path, i)
            ins = [read(v, k, here) for k, v in enumerate(eqn.invars)]
            self.path, self.eqn = here, eqn
            outs = self._apply(eqn, ins)
            self.records[here] = (ins, outs)
            if not self.shadow:
                self.eqns[here] = eqn
            env.update(zip(eqn.outvars, outs, strict=True))
        self.unseen = outer
        return [read(v, k, path) for k, v in enumerate(jaxpr.outvars)]

    def _held(self, value: Any, key: Path) -> Val:
        """A constant that a jaxpr holds itself; replay looks under `key` for its slice."""
        v = self.constant(value, sliceable=True)
        if v.const is not None:
            self.folded[key] = [v]
        return v

    def run_closed(self, closed: Any, args: Sequence[Val], name: int | str) -> list[Val]:
        """Walk a closed jaxpr held by the current equation; `name` tells it from the equation's other jaxprs."""
        path, eqn = self.path, self.eqn
        jaxpr = getattr(closed, "jaxpr", closed)
        self._callers.append(eqn)
        outs = self.run(jaxpr, getattr(closed, "consts", ()), args, (*path, name))
        self._callers.pop()
        self.path, self.eqn = path, eqn
        return outs

    def _apply(self, eqn: Eqn, ins: list[Val]) -> list[Val]:
        name = eqn.primitive.name
        rule = self.rules.get(name)
        if rule is None and _only_looks(eqn):
            return []
        if rule is None:
            self.unsupported.setdefault(name, []).append(self.where)
            self.freeze_all(ins, "UNSUPPORTED", name)
            return [self.opaque(v.aval, "UNSUPPORTED", name) for v in eqn.outvars]
        if self.fold_constants and rule.evaluate is None:
            folded = self._fold(eqn, ins)
            if folded is not None:
                return folded
        outs = rule.propagate(self, eqn, ins)
        if rule.evaluate is None:
            if outs and not eqn.effects and all([v.known or v.scalar is not None for v in ins]):
                _compute_on_demand(eqn, ins, outs)
            for k, o in enumerate(outs):
                if o.leaf is not None:
                    source = next((v for v in ins if v.leaf == o.leaf and v is not o), None)
                    if source is not None:
                        o.moves = (*source.moves, (eqn, k))
        return outs

    def _fold(self, eqn: Eqn, ins: list[Val]) -> list[Val] | None:
        """Evaluate an equation whose operands are all known constants (one of them, or the result, an array)."""
        made = eqn.primitive.name == "iota"
        if not made and not any(v.const is not None for v in ins):
            return None
        if any(v.const is None and v.scalar is None for v in ins) or eqn.effects:
            return None
        args = [v.const if v.const is not None else np.full(v.shape, v.scalar, v.dtype) for v in ins]
        with jax.ensure_compile_time_eval():
            outs = eqn.primitive.bind(*args, **eqn.params)
        outs = list(outs) if eqn.primitive.multiple_results else [outs]
        if any(jnp.issubdtype(o.dtype, jax.dtypes.extended) for o in outs):
            return None
        self.folded[self.path] = vals = [self.constant(np.asarray(o), sliceable=True) for o in outs]
        for v, o in zip(vals, outs, strict=True):
            v.const = np.asarray(o)  # replay needs the value of scalars as well
        return vals


def _compute_on_demand(eqn: Eqn, ins: Sequence[Val], outs: Sequence[Val]) -> None:
    """Let the results of an equation of constants know their values, computed once they are asked for."""
    avals = [v.aval for v in eqn.outvars]
    if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) or x.size > LARGEST_INDEX for x in avals):
        return

    @functools.cache
    def values() -> list[np.ndarray]:
        args = [v.known() if v.known else np.full(v.shape, v.scalar, v.dtype) for v in ins]
        with jax.ensure_compile_time_eval():
            made = eqn.primitive.bind(*args, **eqn.params)
        return [np.asarray(x) for x in (made if eqn.primitive.multiple_results else [made])]

    for k, v in enumerate(outs):
        v.known = lambda k=k: values()[k]


def _needed(jaxpr: Any) -> list[bool]:
    """Per equation, whether a result of the jaxpr depends on it (without effects all others are gone already)."""
    if not jaxpr.effects:
        return [True] * len(jaxpr.eqns)
    live = {id(v) for v in jaxpr.outvars}
    needed = []
    for eqn in reversed(jaxpr.eqns):
        needed.append(any(id(v) in live for v in eqn.outvars))
        if needed[-1]:
            live.update(id(v) for v in eqn.invars)
    return needed[::-1]


def _only_looks(eqn: Eqn) -> bool:
    """Whether an equation returns nothing and writes to none of its operands (debug.print, debug.callback, ...)."""
    return not eqn.outvars and not any(hasattr(v.aval, "inner_aval") for v in eqn.invars)


def _as_float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
