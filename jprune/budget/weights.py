"""Which single weights stay: exact counts per leaf from a sparsity, and masks that keep the largest scores of a pattern.

The threshold of the k largest scores is found two bits at a time, by counts of the scores above three candidates, and
ties go to the lowest positions by counts of positions. No sort, no copy of a leaf on another device: over several devices
a count is one number each. It costs about 30 readings of the scores, whatever k is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jprune.importance.density import proportional
from jprune.surgery.patterns import (
    NM,
    Blocks,
    Pattern,
    Unstructured,
    View,
    by_glob,
    grouped,
    groups_of,
    mask_like,
    patterns_of,
    ungrouped,
    view_of,
)
from jprune.tracing.errors import suggest

Shapes: TypeAlias = Mapping[str, Sequence[int]]
Distribution: TypeAlias = Literal["uniform", "erk"] | Mapping[str, float | None]


# -- counts ----------------------------------------------------------------------------------------------------------


def counts(shapes: Shapes, sparsity: float, distribution: Distribution = "uniform") -> dict[str, int]:
    """How many weights of each leaf stay: {path: int}; exact integers, host-side.

    The sum is round(size (1 - sparsity)) over all leaves together, shares are rounded by the largest remainder (ties to
    the first leaf), and a leaf keeps at least one weight. Sparsities are read as the decimals that they are written as.

    >>> counts({"a": (10, 10), "b": (5, 3)}, 0.9)
    {'a': 10, 'b': 2}

    Args:
      shapes: {path: shape}.
      sparsity: share removed, in [0, 1).
      distribution: "uniform": the same share of each leaf; "erk": densities proportional to sum(shape) / prod(shape), at
        most 1 (Evci et al. 2020), of the sum of size - floor(sparsity size), as jaxpruner counts it; or {path or glob:
        sparsity of its own}, where None is a leaf that stays dense and is left out.

    Raises:
      ValueError: a sparsity outside [0, 1), an unknown distribution, or a glob that fits no leaf.
    """
    shapes = {p: tuple(s) for p, s in shapes.items()}
    size = {p: math.prod(s) for p, s in shapes.items()}
    removed = check_sparsity(sparsity)
    if isinstance(distribution, Mapping):
        own = by_glob(distribution, shapes, "sparsity")
        together: dict[Any, dict[str, int]] = {}
        for p, n in size.items():
            if own.get(p, sparsity) is not None:
                together.setdefault(check_sparsity(own.get(p, sparsity)), {})[p] = n
        found = {}
        for s, sizes in together.items():
            found |= _rounded({p: n * (1 - s) for p, n in sizes.items()}, sizes)
        return {p: found[p] for p in size if p in found}
    if distribution == "uniform":
        return _rounded({p: n * (1 - removed) for p, n in size.items()}, size)
    if distribution != "erk":
        raise ValueError(f"weights are distributed 'uniform', 'erk' or by {{glob: sparsity}}, not {distribution!r}")
    total = sum(n - math.floor(removed * n) for n in size.values())
    share = proportional({p: sum(s) / size[p] for p, s in shapes.items()}, size, total / max(sum(size.values()), 1))
    return _rounded({p: Fraction(share[p]) * n for p, n in size.items()}, size, total)


def check_sparsity(sparsity: Any) -> Fraction:
    """The share removed as the decimal it is written as; ValueError unless it lies in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, float | int | np.number) or not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity is {sparsity}: it is the share of weights that is removed, in [0, 1)")
    return Fraction(repr(float(sparsity)))


def _rounded(shares: Mapping[str, Fraction], size: Mapping[str, int], total: int | None = None) -> dict[str, int]:
    """Whole numbers that add up to `total` (the rounded sum), by largest remainders; from 1 to the leaf's size."""
    total = round(sum(shares.values(), Fraction(0))) if total is None else total
    least = {p: min(1, n) for p, n in size.items()}
    out = {p: min(max(math.floor(x), least[p]), size[p]) for p, x in shares.items()}
    order = sorted(shares, key=lambda p: out[p] - shares[p])  # the largest remainder first; stable
    while (missing := total - sum(out.values())) != 0:
        step = 1 if missing > 0 else -1
        able = [p for p in order if (out[p] < size[p] if step > 0 else out[p] > least[p])]
        if not able:
            return out
        for p in able[: abs(missing)] if step > 0 else able[::-1][: abs(missing)]:
            out[p] += step
    return out


# -- masks -----------------------------------------------------------------------------------------------------------


def choose(
    scores: Mapping[str, Any],
    pattern: Pattern | str | Mapping[str, Pattern | str | None] = Unstructured(),
    amount: float | Mapping[str, Any] | None = None,
    views: Mapping[str, View] | None = None,
    *,
    normalise: bool = False,
) -> dict[str, Any]:
    """Masks that keep the largest scores, exactly as many as asked: {path: bool array of the leaf's shape}.

    Jit-able, and sharded as the scores are. Ties go to the lowest flat index of what is compared: of the leaf, of the row
    or column of its matrix, of the group, or for "model" of all leaves one after the other by their sorted paths. Rows
    and columns share a leaf's number evenly, the first ones have one more. Blocks keep round(blocks x share) of them.

    >>> choose({"w": jnp.array([[3.0, 1.0], [4.0, 2.0]])}, "row", 0.5)["w"].tolist()  # rows of the matrix: outputs
    [[False, False], [True, True]]

    Args:
      scores: {path: floating-point array of the leaf's shape}; larger stays.
      pattern: one for all, or {path or glob: pattern}; leaves that nothing fits are dense and get no mask.
      amount: the sparsity, in [0, 1); or {path: weights that stay}, integers that may be traced, as `counts` makes them
        (for "model" only their sum counts; leaves without a number are dense). N:M needs none.
      views: leaves as matrices, where convention (outputs last, inputs before them) does not hold.
      normalise: for "model": divide each leaf's scores by their L2 norm first.

    Raises:
      ValueError: NaN in scores (under jit NaN counts as the lowest score), scores that are no floating-point numbers,
        a sparsity outside [0, 1), counts outside 0..size, unknown names, an axis that N:M does not divide.
    """
    patterns = patterns_of(pattern, scores)
    for p, v in patterns.items():
        _check_scores(p, scores[p])
        if v not in (Unstructured("leaf"), Unstructured("model")):
            view = view_of(p, np.shape(scores[p]), views)
            if isinstance(v, NM):
                groups_of(p, v, view)
    free = {p: np.shape(scores[p]) for p, v in patterns.items() if not isinstance(v, NM)}
    if isinstance(amount, Mapping):
        if unknown := [p for p in amount if p not in scores]:
            raise ValueError(f"there is a count for {unknown[0]!r}, which has no scores{suggest(unknown[0], scores)}")
        numbers = {p: _checked_count(p, k, np.size(scores[p])) for p, k in amount.items() if p in free}
        patterns = {p: v for p, v in patterns.items() if p in numbers or isinstance(v, NM)}
    elif amount is None:
        if free:
            raise ValueError(f"{patterns[next(iter(free))]} needs a sparsity or counts: how many weights stay?")
        numbers = {}
    else:
        removed = check_sparsity(amount)
        for v in () if free else patterns.values():
            assert isinstance(v, NM)
            if 1 - Fraction(v.keep, v.of) != removed:
                raise ValueError(f"{v} removes {1 - v.keep / v.of:g} of the weights, not {amount}: leave the sparsity "
                                 "out, or choose another pattern")  # fmt: skip
        numbers = {}
        for over_leaves in (False, True):
            numbers |= counts(
                {p: s for p, s in free.items() if (patterns[p] == Unstructured("model")) == over_leaves}, amount
            )
    task = tuple((p, patterns[p], (views or {}).get(p)) for p in sorted(patterns))
    numbers = {p: jnp.asarray(numbers[p], jnp.uint32) for p in patterns if p in numbers}
    return _choose({p: jnp.asarray(scores[p]) for p in patterns}, numbers, task, normalise)


def _check_scores(path: str, x: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"the scores of {path!r} are {x.dtype}: scores are floating-point numbers")
    if np.size(x) >= 2**32:
        raise ValueError(f"leaf {path!r} has {np.size(x)} weights: a leaf is counted in 32 bits, so split it")
    if not isinstance(x, Tracer) and bool(np.isnan(x).any() if isinstance(x, np.ndarray) else jnp.isnan(x).any()):
        raise ValueError(f"the scores of {path!r} hold NaN: look for NaN or infinity in the weights and gradients")


def _checked_count(path: str, k: Any, size: int) -> Any:
    if isinstance(k, Tracer):
        return k
    if isinstance(k, bool | float) or int(k) != k or not 0 <= k <= size:
        raise ValueError(
            f"the count for {path!r} is {k}: it is the number of weights that stay, a whole one of 0 to {size}"
        )
    return int(k)


class _Ask(NamedTuple):
    """Keys that are compared with each other: over all axes of all arrays, or over these axes of one."""

    keys: tuple[Any, ...]
    axes: tuple[int, ...] | None
    k: tuple[Any, Any]  # how many stay, as 16 low bits and the rest, so that sums over leaves may pass 32 bits


@functools.partial(jax.jit, static_argnames=("task", "normalise"))
def _choose(scores: dict[str, Any], numbers: dict[str, Any], task: Any, normalise: bool) -> dict[str, Any]:
    masks: dict[str, Any] = {}
    asks: list[_Ask] = []
    back: list[Callable[[Sequence[Any]], None]] = []

    def ask(ask: _Ask, done: Callable[[Sequence[Any]], None]) -> None:
        asks.append(ask)
        back.append(done)

    def put(path: str, of: Callable[[Any], Any] = lambda m: m) -> Callable[[Sequence[Any]], None]:
        return lambda found: masks.update({path: of(found[0])})

    for path, pattern, own in task:
        s = scores[path]
        if pattern in (Unstructured("leaf"), Unstructured("model")):
            if pattern == Unstructured("leaf"):
                ask(_Ask((_keys(s),), None, _limbs([numbers[path]])), put(path))
            continue
        view = view_of(path, s.shape, None if own is None else {path: own})
        if isinstance(pattern, NM):
            best = _best_of_groups(grouped(s, path, pattern, view, -jnp.inf), pattern.keep)
            masks[path] = ungrouped(best, path, pattern, view, s.shape)
            continue
        matrix, like = view.matrix(s), functools.partial(mask_like, view=view, shape=s.shape)
        if isinstance(pattern, Blocks):
            pooled, whole = _pooled(matrix, pattern)
            k = _share(numbers[path], pooled.size, s.size, path)
            ask(_Ask((_keys(pooled),), None, _limbs([k])), put(path, lambda m, whole=whole, like=like: like(whole(m))))
            continue
        axes = {"matrix": (-2, -1), "row": (-1,), "column": (-2,)}[pattern.within]
        shape = tuple(1 if a - matrix.ndim in axes else n for a, n in enumerate(matrix.shape))
        parts = math.prod(shape)
        each, more = numbers[path] // parts, numbers[path] % parts
        k = each + (lax.iota(jnp.uint32, parts) < more).astype(jnp.uint32)
        ask(_Ask((_keys(matrix),), axes, _limbs([k.reshape(shape)])), put(path, like))
    if model := [p for p, pattern, _ in task if pattern == Unstructured("model")]:
        found = [scores[p].astype(jnp.promote_types(jnp.float32, scores[p].dtype)) for p in model]
        if normalise:
            found = [s / (jnp.sqrt(jnp.sum(s * s)) + 1e-8) for s in found]
        wide = functools.reduce(jnp.promote_types, [s.dtype for s in found])
        keys = tuple(_keys(s.astype(wide)) for s in found)
        ask(_Ask(keys, None, _limbs([numbers[p] for p in model])), lambda m: masks.update(zip(model, m, strict=True)))
    for a, done in zip(asks, back, strict=True):  # one after the other: the keys of a leaf are as large as the leaf
        done(largest(a))
    return masks


def _keys(x: Any) -> Any:
    """Unsigned integers in the order of the numbers; both zeros are one, NaN is the lowest."""
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    kind, width = (jnp.uint32, 32) if x.dtype.itemsize == 4 else (jnp.uint64, 64)
    bits = lax.bitcast_convert_type(x, kind)
    top = kind(1 << (width - 1))
    bits = jnp.where(bits == top, kind(0), bits)
    return jnp.where(jnp.isnan(x), kind(0), jnp.where(bits >= top, ~bits, bits | top))


def _limbs(numbers: Sequence[Any]) -> tuple[Any, Any]:
    """The sum of 32-bit numbers as (multiples of 2^16, rest)."""
    high = functools.reduce(jnp.add, [n >> 16 for n in numbers])
    low = functools.reduce(jnp.add, [n & 0xFFFF for n in numbers])
    return high + (low >> 16), low & 0xFFFF


def _not_less(a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def _minus(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    borrow = (a[1] < b[1]).astype(jnp.uint32)
    return a[0] - b[0] - borrow, a[1] + (borrow << 16) - b[1]


def _counts(tests: Sequence[Any], axes: tuple[int, ...] | None) -> list[Any]:
    """How often each of several tests is true."""
    if axes is not None:
        return [jnp.sum(t, axis=axes, keepdims=True, dtype=jnp.uint32) for t in tests]
    # XLA writes no integers for the tests of a reduction of several operands; over devices it moves single numbers
    return list(
        lax.reduce(
            tuple(t.astype(jnp.uint32) for t in tests),
            tuple(jnp.uint32(0) for _ in tests),
            lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
            tuple(range(tests[0].ndim)),
        )
    )


def largest(ask: _Ask) -> list[Any]:
    """The masks of the k largest keys; two bits of the threshold in each reading of the keys."""
    width = 8 * ask.keys[0].dtype.itemsize
    kind = jnp.uint32 if width == 32 else jnp.uint64

    def two_bits(i: Any, t: Any) -> Any:
        shift = (width - 2 - 2 * i).astype(kind)
        higher = [t | (kind(digit) << shift) for digit in (1, 2, 3)]
        counts = [_counts([x >= h for h in higher], ask.axes) for x in ask.keys]
        digit = sum(_not_less(_limbs(n), ask.k).astype(kind) for n in zip(*counts, strict=True))
        return t | (digit << shift)

    t = lax.fori_loop(0, width // 2, two_bits, jnp.zeros(ask.k[0].shape, kind))
    quotas = _ties(ask, t)
    steps = (max(x.size for x in ask.keys).bit_length() + 1) // 2

    def two_bits_of_positions(i: Any, found: list[Any]) -> list[Any]:
        shift = (2 * (steps - 1 - i)).astype(jnp.uint32)
        out = []
        for x, (quota, _), end in zip(ask.keys, quotas, found, strict=True):
            tie, at = x == t, _positions(x.shape, ask.axes)
            before = _counts([tie & (at < (end | (jnp.uint32(d) << shift))) for d in (1, 2, 3)], ask.axes)
            out.append(end | (sum((n <= quota).astype(jnp.uint32) for n in before) << shift))
        return out

    start = [jnp.zeros(t.shape, jnp.uint32) for _ in ask.keys]
    ends = lax.cond(
        functools.reduce(jnp.logical_or, [jnp.any(quota != ties) for quota, ties in quotas]),
        lambda: lax.fori_loop(0, steps, two_bits_of_positions, start),
        lambda: [jnp.full_like(end, 2**32 - 1) for end in start],  # all that tie stay
    )
    return [(x > t) | ((x == t) & (_positions(x.shape, ask.axes) < end)) for x, end in zip(ask.keys, ends, strict=True)]


def _ties(ask: _Ask, threshold: Any) -> list[tuple[Any, Any]]:
    """(how many of those at the threshold stay, how many there are) for each array, the first ones first."""
    found = [_counts([x > threshold, x == threshold], ask.axes) for x in ask.keys]
    left = _minus(ask.k, _limbs([above for above, _ in found]))
    out = []
    for _, ties in found:
        quota = jnp.where(_not_less(left, _limbs([ties])), ties, (left[0] << 16) | left[1])
        left = _minus(left, _limbs([quota]))
        out.append((quota, ties))
    return out


def _positions(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> Any:
    """Each entry's flat index in what it is compared with."""
    at, stride = jnp.zeros(shape, jnp.uint32), 1
    for a in reversed(range(len(shape)) if axes is None else sorted(a % len(shape) for a in axes)):
        at += lax.broadcasted_iota(jnp.uint32, shape, a) * jnp.uint32(stride)
        stride *= shape[a]
    return at


def _best_of_groups(s: Any, keep: int) -> Any:
    """The `keep` best of the last axis, ties to the first."""
    s = _keys(s)
    a, b = s[..., :, None], s[..., None, :]
    before = jnp.tri(s.shape[-1], k=-1, dtype=bool)  # entry j stands before entry i
    return jnp.sum((b > a) | ((b == a) & before), axis=-1) < keep


def _pooled(matrix: Any, pattern: Blocks) -> tuple[Any, Callable[[Any], Any]]:
    """Scores of the blocks, and what makes a mask of the matrix's shape of one of the blocks."""
    (h, w), (rows, columns) = pattern.shape, matrix.shape[-2:]
    missing = (-rows % h, -columns % w)

    def blocks(x: Any, fill: float) -> Any:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in missing], constant_values=fill)
        return x.reshape(*x.shape[:-2], x.shape[-2] // h, h, x.shape[-1] // w, w)

    if pattern.pool == "max":
        pooled = jnp.max(blocks(matrix, -jnp.inf), (-3, -1))
    else:
        wide = matrix.astype(jnp.promote_types(jnp.float32, matrix.dtype))
        pooled = jnp.sum(blocks(wide, 0.0), (-3, -1)) / jnp.sum(blocks(jnp.ones((rows, columns)), 0.0), (-3, -1))
    return pooled, lambda m: jnp.repeat(jnp.repeat(m, h, -2), w, -1)[..., :rows, :columns]


def _share(k: Any, blocks: int, size: int, path: str) -> Any:
    """round(k blocks / size), half up, in 32 bits."""
    common = math.gcd(blocks, size)
    times, over = blocks // common, size // common
    if times * size + over >= 2**32:
        raise ValueError(f"the blocks of {path!r} do not divide it, and it is too large to count them in 32 bits")
    return (k * jnp.uint32(times) + jnp.uint32(over // 2)) // jnp.uint32(over)
