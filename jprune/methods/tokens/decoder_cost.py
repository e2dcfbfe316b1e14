"""What a language model's prefill costs when visual tokens are dropped: by the literature's rule, and counted as it is.

The rule, T layers of width d with an MLP of width m (FastV's, taken over by later papers; DivPrune's tables are its averages):

    cost(n) = 4 n d^2 + 2 n^2 d + 2 n d m        a layer of n tokens
    total   = K cost(text + visual) + (T - K) cost(text + kept)

Papers print it as "FLOPs"; it counts MACs, and two matrices of the MLP where LLaMA has three. `true_macs` counts the model as
it is. A method that drops tokens behind layer K pays K layers of all of them:
with equal cost in mind, `kept_within` and `last_layer_within` say what is left for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from jprune.models.llama_config import LlamaConfig

# Average numbers of tokens a prompt in the evaluations whose cost DivPrune's tables print.
TEXT_TOKENS: Mapping[str, int] = {
    "COCO": 15, "Flickr": 15, "GQA": 23, "MMB": 83, "MME": 25, "MMMU": 113, "NoCaps": 15, "OKVQA": 39, "POPE": 21, "SQA": 91,
    "SEED": 57,
}  # fmt: skip
ANYRES_TOKENS: Mapping[str, int] = {
    "COCO": 2225, "Flickr": 1922, "GQA": 2239, "MMB": 1927, "MME": 2108, "MMMU": 1882, "NoCaps": 2292, "OKVQA": 2249,
    "POPE": 2250, "SQA": 1598, "SEED": 2116,
}  # fmt: skip
VIDEO_TEXT_TOKENS: Mapping[str, int] = {
    "ActivityNet": 28, "SEED": 63, "VideoChatGPT": 21, "NextQA": 38, "EgoSchema": 196,
}  # fmt: skip


def paper_tmacs(
    config: LlamaConfig, text: int, visual: int, keep: float = 1.0, layer: int = 0, kept: int | None = None
) -> float:
    """The rule above, in units of 10^12.

    Args:
      config: of the language model, all layers equally wide.
      text, visual: tokens.
      keep: share of the visual tokens that layers from `layer` on see; what is dropped is rounded, halves to even.
      layer: how many layers see all tokens.
      kept: visual tokens that stay, instead of a share.

    Raises:
      ValueError: layers of different widths, a layer or a number of tokens that there is not.
    """
    if not config.uniform:
        raise ValueError("the rule knows one width for all layers: use true_macs for this model")
    _check(config, visual, layer, kept)
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}: a share of the visual tokens is between 0 and 1")
    d, m = config.stream, config.ffn[0]
    left = visual - round((1 - keep) * visual) if kept is None else kept

    def cost(n: int) -> int:
        return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m

    return (layer * cost(text + visual) + (config.depth - layer) * cost(text + left)) / 1e12


def true_macs(
    config: LlamaConfig, text: int, visual: int, kept: int | None = None, layer: int = 0, logits: int = 1
) -> int:
    """MACs of reading a prompt: projections with grouped heads, attention, gated MLP, logits.

    Attention is counted over all pairs of tokens, as the masked products are computed; norms, the softmax and rotations
    are left out.

    Args:
      config: of the language model.
      text, visual: tokens.
      kept: visual tokens that layers from `layer` on see; None: all.
      layer: how many layers see all tokens.
      logits: tokens that the output layer runs for.

    Raises:
      ValueError: a layer or a number of tokens that there is not.
    """
    _check(config, visual, layer, kept)
    left = visual if kept is None else kept
    total = config.stream * config.vocab * logits
    for i, (heads, kv, value, ffn) in enumerate(zip(config.q_heads, config.kv_heads, config.value_dims, config.ffn)):
        n = text + (visual if i < layer else left)
        head = config.head_dim
        weights = config.stream * (heads * head + kv * (head + value) + heads * value + 3 * ffn)
        total += n * weights + n * n * heads * (head + value)
    return total


def kept_within(config: LlamaConfig, text: int, visual: int, tmacs: float, layer: int = 0) -> int:
    """The most visual tokens that may stay behind `layer` layers at `paper_tmacs` of at most `tmacs`; 0 is possible.

    Raises:
      ValueError: dropping all of them there costs more.
    """
    least = paper_tmacs(config, text, visual, layer=layer, kept=0)
    if least > tmacs:
        raise ValueError(
            f"{layer} layers of all tokens and the text alone behind them cost {least:.4g}, more than {tmacs:.4g}: "
            "drop earlier or allow more"
        )
    low, high = 0, visual
    while low < high:
        middle = (low + high + 1) // 2
        fits = paper_tmacs(config, text, visual, layer=layer, kept=middle) <= tmacs
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def last_layer_within(config: LlamaConfig, text: int, visual: int, tmacs: float) -> int:
    """The most layers that may see all tokens if none is kept behind them, at `paper_tmacs` of at most `tmacs` (VTW).

    Raises:
      ValueError: the text alone costs more.
    """
    fits = [
        layer for layer in range(config.depth + 1) if paper_tmacs(config, text, visual, layer=layer, kept=0) <= tmacs
    ]
    if not fits:
        raise ValueError(f"the text alone costs more than {tmacs:.4g}: allow more")
    return fits[-1]


def _check(config: LlamaConfig, visual: int, layer: int, kept: int | None) -> None:
    if not 0 <= layer <= config.depth:
        raise ValueError(f"layer is {layer}: the model has {config.depth} of them")
    if kept is not None and not 0 <= kept <= visual:
        raise ValueError(f"kept is {kept}: there are {visual} visual tokens")
