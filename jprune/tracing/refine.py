"""How tags are refined: axes are cut, taken in another order, and declared to be the same axis.

Meeting axes are unified. An axis may also hold the positions of another one in another order (`Order`); where such axes
meet, `tie` goes position by position. What cannot be aligned raises `Misaligned`; the caller then freezes.
"""

from __future__ import annotations

import numpy as np

from jprune.tracing.tags import (
    MISALIGNED_SLICE,
    SEGMENT_AXIS,
    SINGLE_INDEX,
    Atom,
    Dim,
    Frozen,
    Misaligned,
    Order,
    Sum,
    Tag,
    atoms,
    freeze,
    norm,
    ordered,
    reordered,
    same_in_blocks,
    size,
    stiffen,
    substitute,
    whole_blocks,
)


def split_atom(atom: Atom, q: int) -> tuple[Tag, Tag]:
    """Cut an atom into (major of size q, minor)."""
    front, back = atom.piece(q), atom.piece(atom.n // q)
    if atom.reason is None:
        atom.subst = (front, back)
    else:
        atom.rigid = True
        if atom.input_dim is None and atom.scan is None:
            atom.subst = (front, back)
    return (front,), (back,)


def split_sum(total: Sum, q: int) -> tuple[Tag, Tag]:
    """Cut a concatenation into (major of size q, minor of size n/q)."""
    m = total.n // q
    if all(size(p) % m == 0 for p in total.parts):
        fronts: list[Tag] = []
        back: Tag | None = None
        for p in total.parts:
            front, rest = split_front(norm(p), size(p) // m)
            fronts.append(front)
            if back is None:
                back = rest
            else:
                unify(back, rest)
        assert back is not None
        return norm((Sum(tuple(fronts)),)), norm(back)
    whole: Tag = (total,)
    parts = [slice_tag(whole, i * m, (i + 1) * m) for i in range(q)]
    for p in parts[1:]:
        unify(parts[0], p)
    return (Atom(q, Frozen(SEGMENT_AXIS)),), norm(parts[0])


def _split_order(d: Order, q: int) -> tuple[Tag, Tag]:
    """Cut a reordered axis into (major of size q, minor), where the order is one of blocks, or the same in all."""
    m = d.n // q
    order = whole_blocks(d.index, m)
    if order is not None:
        front, back = split_front(norm(d.inner), q)
        return ordered(norm(front), order), norm(back)
    order = same_in_blocks(d.index, q, m)
    if order is not None:
        front, back = split_front(norm(d.inner), q)
        return norm(front), ordered(norm(back), order)
    raise Misaligned


def split_front(tag: Tag, n: int) -> tuple[Tag, Tag]:
    """(front of size n, rest) of an axis, cutting the dim that straddles the boundary."""
    tag = norm(tag)
    if size(tag) == 0:
        raise Misaligned
    front: list[Dim] = []
    for i, d in enumerate(tag):
        if n == 1:
            return tuple(front), tag[i:]
        if d.n <= n:
            if n % d.n:
                raise Misaligned
            front.append(d)
            n //= d.n
            continue
        if d.n % n:
            raise Misaligned
        if isinstance(d, Order):
            head, back = _split_order(d, n)
        else:
            head, back = split_atom(d, n) if isinstance(d, Atom) else split_sum(d, n)
        # splitting may refine the dims behind as well (they can share atoms)
        return norm((*front, *head)), norm((*back, *tag[i + 1 :]))
    if n != 1:
        raise Misaligned
    return tuple(front), ()


def slice_tag(tag: Tag, lo: int, hi: int, where: str = "") -> Tag:
    """The tag of positions lo..hi-1, cutting atoms at both ends."""
    tag = norm(tag)
    if lo == 0 and hi == size(tag):
        return tag
    major, rest = tag[0], tag[1:]
    inner = size(rest)
    if lo % inner == 0 and hi % inner == 0:
        middle = _slice_dim(major, lo // inner, hi // inner, where)
        return norm((*middle, *rest))
    first, last = lo // inner, (hi - 1) // inner
    if first == last:
        freeze(_slice_dim(major, first, first + 1, where), Frozen(SINGLE_INDEX, "", where))
        return slice_tag(rest, lo - first * inner, hi - first * inner, where)
    reason = Frozen(MISALIGNED_SLICE, "", where)
    freeze(rest, reason)
    parts: list[Tag] = []
    whole_lo, whole_hi = -(-lo // inner), hi // inner
    if lo % inner:
        freeze(_slice_dim(major, first, first + 1, where), reason)
        parts.append((Atom(whole_lo * inner - lo, reason),))
    if whole_hi > whole_lo:
        parts.append((*slice_tag((major,), whole_lo, whole_hi, where), *rest))
    if hi % inner:
        freeze(slice_tag((major,), last, last + 1, where), reason)
        parts.append((Atom(hi - whole_hi * inner, reason),))
    return norm((Sum(tuple(parts)),))


def _slice_dim(d: Dim, lo: int, hi: int, where: str) -> Tag:
    if lo == 0 and hi == d.n:
        return (d,)
    if isinstance(d, Sum):
        parts: list[Tag] = []
        offset = 0
        for p in d.parts:
            n = size(p)
            a, b = max(lo - offset, 0), min(hi - offset, n)
            if a < b:
                parts.append(slice_tag(p, a, b, where))
            offset += n
        return norm((Sum(tuple(parts)),))
    if isinstance(d, Order):
        return take(d.inner, d.index[lo:hi], where)
    if d.reason is not None:
        d.rigid = True
        return (d.piece(hi - lo),)
    pieces = [d.piece(n) if n else None for n in (lo, hi - lo, d.n - hi)]
    middle = pieces[1]
    assert middle is not None
    d.subst = (Sum(tuple((p,) for p in pieces if p is not None)),)
    return (middle,)


def unify(a: Tag, b: Tag) -> None:
    """Declare two axes of equal size to be the same axis; raises Misaligned if they have no common pieces."""
    a, b = norm(a), norm(b)
    if a == b:
        return
    if not a or not b:  # size 1 against a cut-off single unit: that unit has to stay
        freeze(a or b, Frozen(SINGLE_INDEX))
    elif len(a) == 1 and isinstance(a[0], Atom):
        _merge(a[0], b)
    elif len(b) == 1 and isinstance(b[0], Atom):
        _merge(b[0], a)
    elif any(isinstance(d, Order) for d in (*a, *b)):
        _unify_ordered(a, b)
    elif len(a) == 1 and len(b) == 1 and isinstance(a[0], Sum) and isinstance(b[0], Sum):
        _unify_sums(a[0], b[0])
    elif a[0].n == 1 or b[0].n == 1:  # a cut-off single unit inside a product
        if a[0].n == b[0].n:
            unify((a[0],), (b[0],))
            unify(a[1:], b[1:])
        else:
            single, rest, other = (a[0], a[1:], b) if a[0].n == 1 else (b[0], b[1:], a)
            freeze((single,), Frozen(SINGLE_INDEX))
            unify(rest, other)
    else:
        _unify_fronts(a, b)


def _unify_fronts(a: Tag, b: Tag) -> None:
    n = min(a[0].n, b[0].n)
    front_a, rest_a = split_front(a, n)
    front_b, rest_b = split_front(norm(b), n)
    unify(front_a, front_b)
    unify(rest_a, rest_b)


def _unify_ordered(a: Tag, b: Tag) -> None:
    one, other = a[0], b[0]
    if isinstance(one, Order) and isinstance(other, Order) and len(a) == len(b) == 1 and one.inner == other.inner:  # noqa: SIM102
        if (one.index == other.index).all():
            return
    if 1 < min(one.n, other.n) < size(a):
        try:
            return _unify_fronts(a, b)
        except Misaligned:
            a, b = norm(a), norm(b)
    tie(a, b, np.arange(size(a)))


def take(tag: Tag, index: np.ndarray, where: str = "") -> Tag:
    """The tag of positions `index` of an axis: any of them, in any order, also several times.

    An axis that is repeated whole, or position by position, gets a free dim for the copies.
    """
    tag = norm(tag)
    n, k = size(tag), len(index)
    if k and (index == index[0] + np.arange(k)).all():
        return slice_tag(tag, int(index[0]), int(index[0]) + k, where)
    stiffen(tag)
    if k % n == 0 and (index == np.tile(np.arange(n), k // n)).all():
        return (Atom(k // n), *tag)
    if k % n == 0 and (index == np.repeat(np.arange(n), k // n)).all():
        return (*tag, Atom(k // n))
    for i in range(1, len(tag)):
        front = whole_blocks(index, size(tag[i:]))
        if front is not None:
            return norm((*take(tag[:i], front, where), *tag[i:]))
        back = same_in_blocks(index, size(tag[:-i]), size(tag[-i:]))
        if back is not None:
            return norm((*tag[:-i], *take(tag[-i:], back, where)))
    new = Atom(k)
    tie(tag, (new,), index)
    return norm((new,))


def owners(tag: Tag, live: list[Atom]) -> tuple[np.ndarray, np.ndarray]:
    """Per position the live atom it belongs to (its place in `live`, -1: none) and the unit of it."""
    owner, unit = np.full(1, -1), np.zeros(1, int)
    for d in norm(tag):
        if isinstance(d, Order):
            o, u = (x[d.index] for x in owners(d.inner, live))
        elif isinstance(d, Sum):
            parts = [owners(p, live) for p in d.parts]
            o, u = (np.concatenate(x) for x in zip(*parts, strict=True))
        elif d.reason is not None:
            o, u = np.full(d.n, -1), np.zeros(d.n, int)
        else:
            at = next((i for i, x in enumerate(live) if x is d), len(live))
            if at == len(live):
                live.append(d)
            o, u = np.full(d.n, at), np.arange(d.n)
        if (owner[:, None] >= 0).any() and (o >= 0).any():
            raise Misaligned  # positions would belong to two units at once
        major = owner[:, None] >= 0
        unit = np.where(major, unit[:, None], u[None]).ravel()
        owner = np.where(major, owner[:, None], o[None]).ravel()
    return owner, unit


def tie(a: Tag, b: Tag, index: np.ndarray) -> None:
    """Declare position j of `b` to be position index[j] of `a`, for axes of which each position belongs to one unit.

    Units that meet, directly or through others, become one. Every atom is replaced by what it is made of: the new
    units by how many of the old units of each atom they hold (so that widths stay sums of products), in the order in
    which the atom holds them. What meets a frozen position is frozen.
    """
    from scipy.sparse import coo_array  # few functions need it, and it takes longer to import than they to trace
    from scipy.sparse.csgraph import connected_components

    live: list[Atom] = []
    (left, left_unit), (right, right_unit) = owners(a, live), owners(b, live)
    single = Frozen(SINGLE_INDEX)  # a position that no atom stands for: padding, or a unit that was taken out
    reason = next((x.reason for t in (a, b) for x in atoms(t) if x.reason is not None), single)
    starts = np.cumsum([0, *(x.n for x in live)])
    total = int(starts[-1])
    node = [np.where(o >= 0, starts[o] + u, total) for o, u in ((left, left_unit), (right, right_unit))]
    pairs = node[0][index], node[1]
    graph = coo_array((np.ones(len(index)), pairs), shape=(total + 1, total + 1))
    merged = connected_components(graph, directed=False)[1]
    _, first, merged = np.unique(merged, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # classes in the order in which they are first met
    merged = rank[merged]
    of_atom = np.repeat(np.arange(len(live)), [x.n for x in live])
    counts = np.zeros((int(merged.max()) + 1, len(live) + 1), int)
    np.add.at(counts, (merged[:-1], of_atom), 1)
    counts[merged[-1], :] = 0
    counts[merged[-1], -1] = 1  # the class of what is frozen
    kinds, kind = np.unique(counts, axis=0, return_inverse=True)
    kind = np.ravel(kind)
    place = np.zeros(len(counts), int)
    new: list[Atom] = []
    for s in range(len(kinds)):
        mine = np.flatnonzero(kind == s)
        place[mine] = np.arange(len(mine))
        new.append(Atom(len(mine), reason if kinds[s, -1] else None))
    for i, atom in enumerate(live):
        own = merged[starts[i] : starts[i + 1]]
        order, parts, offset = np.zeros(atom.n, int), [], 0
        for s in np.unique(kind[own]):
            at = np.flatnonzero(kind[own] == s)
            if kinds[s, -1]:
                parts.append((Atom(len(at), reason),))
                order[at] = offset + np.arange(len(at))
            else:
                m = kinds[s, i]
                parts.append((new[s],) if m == 1 else (new[s], Atom(int(m), Frozen(SEGMENT_AXIS))))
                sort = np.argsort(own[at], kind="stable")
                order[at[sort]] = offset + place[own[at[sort]]] * m + np.arange(len(at)) % m
            offset += len(at)
        substitute(atom, norm(ordered(norm((Sum(tuple(parts)),)), order)))


def _merge(atom: Atom, tag: Tag) -> None:
    other = tag[0] if len(tag) == 1 and isinstance(tag[0], Atom) else None
    if other is not None and atom.reason is not None and other.reason is None:
        atom, other, tag = other, atom, (atom,)
    if atom.reason is None:
        if other is not None or not any([x is atom for x in atoms(tag)]):
            substitute(atom, tag)
        elif any(x is atom for x in reordered(tag)):
            tie((atom,), tag, np.arange(atom.n))
        else:  # only possible around size-1 pieces of itself
            freeze(tag, Frozen(SEGMENT_AXIS))
    elif other is None:
        stiffen((atom,))
        freeze(tag, atom.reason)
    elif atom.input_dim is not None and other.input_dim is not None:
        substitute(atom, tag)  # two inputs that share this dimension
    elif atom.scan is not None and other.scan is not None:
        substitute(atom, tag)  # two scans over the same layers
    else:
        atom.rigid = other.rigid = True


def _unify_sums(a: Sum, b: Sum) -> None:
    left, right = list(a.parts), list(b.parts)
    while left:
        x, y = norm(left.pop(0)), norm(right.pop(0))
        if len(x) == 1 and isinstance(x[0], Sum):
            left[:0] = x[0].parts
            right.insert(0, y)
            continue
        if len(y) == 1 and isinstance(y[0], Sum):
            right[:0] = y[0].parts
            left.insert(0, x)
            continue
        nx, ny = size(x), size(y)
        if nx > ny:
            head = slice_tag(x, 0, ny)
            left.insert(0, slice_tag(norm(x), ny, nx))
            unify(head, y)
        elif ny > nx:
            head = slice_tag(y, 0, nx)
            right.insert(0, slice_tag(norm(y), nx, ny))
            unify(x, head)
        else:
            unify(x, y)
