"""Settings of token reducers that meet a budget: the share of the blocks' MACs that is left.

Every method has one knob (a rate, a number per block) that is found by bisection, down to whole tokens per block; then single
tokens are added, latest blocks first, as long as they fit. What is left under the budget is less than a token of some block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jprune.methods.tokens.ats import ATS
from jprune.methods.tokens.cost import Counts, Dims, blocks_macs
from jprune.methods.tokens.tome import ToMe
from jprune.methods.tokens.topk import TopK
from jprune.methods.tokens.zero_tprune import PAPER_VARIANCES, PruneSpec, ZeroTPrune


def check_fraction(fraction: float) -> None:
    """Raise ValueError unless it is above 0 and at most 1."""
    if not 0 < fraction <= 1:
        raise ValueError(f"the share of MACs is {fraction}: it must be above 0 and at most 1, 0.65 say")


def counts_of(dims: Dims, layers: Sequence[int], kept: Sequence[int], inside: bool) -> tuple[Counts, ...]:
    """Tokens of each block if so many patches are left in these blocks, dropped before the MLP (`inside`) or after it."""
    at, now, found = dict(zip(layers, kept, strict=True)), dims.tokens, []
    for i in range(dims.depth):
        after = min(now, dims.prefix + at[i]) if i in at else now
        found.append(Counts(now, after if inside else now))
        now = after
    return tuple(found)


def share(dims: Dims, layers: Sequence[int], kept: Sequence[int], inside: bool) -> float:
    """Of the unreduced blocks' MACs."""
    return blocks_macs(dims, counts_of(dims, layers, kept, inside)) / blocks_macs(dims, counts_of(dims, (), (), False))


def fitted(
    dims: Dims,
    fraction: float,
    layers: Sequence[int],
    kept_at: Callable[[float], Sequence[int]],
    inside: bool,
) -> tuple[list[int], float]:
    """(patches left in each layer, strength): at most `fraction` of the MACs, and one patch more would be over it.

    Arguments:
      dims: of the model.
      fraction: of the unreduced blocks' MACs.
      layers: blocks that drop, ascending.
      kept_at: patches left in each at a strength in [0, 1]: non-increasing in it, and in the layers.
      inside: see `counts_of`.

    Raises:
      ValueError: a budget outside (0, 1], or one that these layers cannot reach.
    """
    check_fraction(fraction)
    low, high = 0.0, 1.0
    least = share(dims, layers, kept_at(1.0), inside)
    if least > fraction:
        raise ValueError(
            f"{fraction:.3f} of the MACs cannot be reached: dropping in blocks {', '.join(map(str, layers))} leaves at least "
            f"{least:.3f}, for what comes before them stays; ask for more, or for a method that drops earlier"
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if share(dims, layers, kept_at(middle), inside) <= fraction else (middle, high)
    kept = list(kept_at(high))
    i = len(kept) - 1
    while i >= 0:
        more = [*kept[:i], kept[i] + 1, *kept[i + 1 :]]
        if kept[i] < (kept[i - 1] if i else dims.patches) and share(dims, layers, more, inside) <= fraction:
            kept, i = more, len(kept) - 1  # there may be room behind it now
        else:
            i -= 1
    return kept, high


def evenly(depth: int, twelfths: Sequence[int]) -> tuple[int, ...]:
    """Blocks at these twelfths of the depth, each once, the last block excluded (nothing follows it)."""
    return tuple(sorted({min(depth * t // 12, depth - 2) for t in twelfths if depth > 1}))


def _geometric(dims: Dims, number: int) -> Callable[[float], list[int]]:
    """The same share of patches dropped each time, from none to all but one."""

    def kept_at(strength: float) -> list[int]:
        n, out = dims.patches, []
        for _ in range(number):
            n = max(1, int(n * (1 - strength) + 1e-9))
            out.append(n)
        return out

    return kept_at


# -- Zero-TPrune ------------------------------------------------------------------------------------------------------

# (share of 196 patches that stage S removes each time, rates of stage I): none, the c-, a- and b-like presets, and an end
_FAMILY = (
    (0.0, (1.0, 1.0, 1.0, 1.0)),
    (5 / 196, (1.0, 0.99, 0.94, 0.89)),
    (8 / 196, (1.0, 0.83, 0.78, 0.73)),
    (16 / 196, (1.0, 0.81, 0.71, 0.61)),
    (80 / 196, (0.05, 0.3, 0.3, 0.3)),
)


def _member(dims: Dims, number: int, strength: float) -> list[PruneSpec]:
    """Specs without a layer of the family's member, linear between its corners."""
    place = strength * (len(_FAMILY) - 1)
    i = min(int(place), len(_FAMILY) - 2)
    part, (one, two) = place - i, _FAMILY[i : i + 2]
    similar = one[0] + part * (two[0] - one[0])
    rates = [a + part * (b - a) for a, b in zip(one[1], two[1], strict=True)]
    n, specs = dims.patches, []
    for k in range(number):
        remove = min(int(similar * dims.patches + 1e-9), n // 2)
        keep = max(1, int((n - remove) * rates[k] + 1e-9))
        specs.append(PruneSpec(0, remove, keep=keep))
        n = keep
    return specs


def schedule_for(
    fraction: float, dims: Dims, boost: bool | None = None, vhf: tuple[float, float] | None = None
) -> ZeroTPrune:
    """A Zero-TPrune schedule that leaves this share of the blocks' MACs, without a search (see `search`).

    After blocks at 0, 2, 5 and 8 twelfths of the depth, both stages, with numbers between those of the presets of 0.87, 0.65 and
    0.55 and scaled to the model; 30, 5, 5 and 1 votes.

    Arguments:
      fraction: of the unreduced model's blocks.
      dims: of the model.
      boost: whether special tokens vote more at first; None: if there are any.
      vhf: range of variances of heads that count; None: all. The paper's (0.01, 0.7) was found on DeiT.

    Raises:
      ValueError: a budget outside (0, 1], or one out of reach.
    """
    layers = evenly(dims.depth, (0, 2, 5, 8))
    if not layers:
        raise ValueError(f"a model of {dims.depth} block has nothing to save by dropping tokens after it")

    def kept_at(strength: float) -> list[int]:
        return [s.keep for s in _member(dims, len(layers), strength)]

    kept, strength = fitted(dims, fraction, layers, kept_at, inside=False)
    votes = (30, 5, 5, 1)[-len(layers) :]
    specs, n = [], dims.patches
    for layer, keep, iters, member in zip(layers, kept, votes, _member(dims, len(layers), strength), strict=True):
        remove = min(member.remove, n - keep, n // 2)
        boosted = dims.prefix > 0 if boost is None else boost
        specs.append(
            dataclasses.replace(member, layer=layer, remove=remove, keep=keep, iters=iters, boost=boosted, vhf=vhf)
        )
        n = keep
    return ZeroTPrune(tuple(specs))


def deit_variances(dims: Dims) -> tuple[float, float] | None:
    """The paper's range for models of DeiT's size (192 wide and 12 deep, or more), else None: it does not carry over."""
    return PAPER_VARIANCES if dims.width >= 192 and dims.depth >= 12 else None


# -- baselines --------------------------------------------------------------------------------------------------------


def tome_for(fraction: float, dims: Dims, attention_by_size: bool = True) -> ToMe:
    """ToMe with as nearly as possible the same number of merged tokens in every block.

    Raises:
      ValueError: as `fitted`.
    """
    layers = range(dims.depth)

    def kept_at(strength: float) -> list[int]:
        total, n, out = int(strength * dims.depth * dims.patches), dims.patches, []
        for i in layers:
            r = total * (i + 1) // dims.depth - total * i // dims.depth
            n -= min(r, n // 2)
            out.append(n)
        return out

    kept, _ = fitted(dims, fraction, layers, kept_at, inside=True)
    before = [dims.patches, *kept[:-1]]
    return ToMe(tuple(a - b for a, b in zip(before, kept, strict=True)), attention_by_size)


def topk_for(fraction: float, dims: Dims, score: str, inside: bool = True, fused: bool = False) -> TopK:
    """The same share of patches dropped in blocks at 3, 6 and 9 twelfths of the depth, as in EViT; if that is too late, at 0 too.

    Raises:
      ValueError: as `fitted`.
    """
    more = int(fused)  # the fused token takes a place, and is a patch to the next block

    def make(twelfths: tuple[int, ...]) -> TopK:
        layers = evenly(dims.depth, twelfths)
        kept, _ = fitted(dims, fraction, layers, _geometric(dims, len(layers)), inside)
        drops = zip(layers, [dims.patches, *kept], kept)
        return TopK(score, tuple((i, max(1, k - more)) for i, n, k in drops if k < n), inside, fused)

    try:
        return make((3, 6, 9))
    except ValueError:
        return make((0, 3, 6, 9))


def ats_for(fraction: float, dims: Dims) -> ATS:
    """ATS with one number of samples in all blocks from the fourth of twelve on, or from the first if that is too late.

    The budget is that of the places: an image whose attention is concentrated keeps fewer tokens.

    Raises:
      ValueError: as `fitted`.
    """

    def make(first: int) -> ATS:
        layers = range(first, dims.depth)

        def kept_at(strength: float) -> list[int]:
            return [max(2, round((1 - strength) * dims.patches))] * len(layers)

        kept, _ = fitted(dims, fraction, layers, kept_at, inside=True)
        return ATS(tuple((i, n) for i, n in zip(layers, kept, strict=True) if n < dims.patches))

    try:
        return make(dims.depth // 4)
    except ValueError:
        return make(0)


def entry_for(fraction: float, dims: Dims) -> int:
    """Patches to keep before the first block; the nearest number, since a single patch is more than 1 % of small models.

    Raises:
      ValueError: a budget outside (0, 1].
    """
    check_fraction(fraction)

    def cost(n: int) -> float:
        return blocks_macs(dims, (Counts(dims.prefix + n, dims.prefix + n),) * dims.depth)

    whole = cost(dims.patches)
    return min(range(1, dims.patches + 1), key=lambda n: abs(cost(n) / whole - fraction))
