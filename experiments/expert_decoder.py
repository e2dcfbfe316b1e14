"""Small decoders with experts, or without, on Python's standard library byte by byte: trained, measured, decoded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.stdlib_lm import initial, read_corpus
from experiments.study import Run
from jprune.data.text import sample_windows, windows
from jprune.language.perplexity import window_losses
from jprune.methods.experts.losses import AdaptiveFactor
from jprune.methods.experts.sparsity import chunk_sparsity, dead_experts, reuse, token_sparsity
from jprune.methods.experts.speculative import speculate
from jprune.methods.experts.training import ExpertLosses, routed_layers, train_experts
from jprune.models.llama import Llama, llama_config
from jprune.models.moe import Experts, ReluNorm, ReMoE, TopK


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the decoder and of its training.

    Attributes:
      stream, depth, heads: of the decoder
      experts, width: how many, and how wide each is
      active: experts that TopK and ReMoE run
      tokens, batch, steps: of training
      chunk: of the loss of chunks
      locality, factor, stable, adjust: BlockFFN's
      measured: batches of held-back text
      prompts, answer: of decoding
    """

    stream: int = 128
    depth: int = 2
    heads: int = 4
    experts: int = 32
    width: int = 16
    active: int = 6
    tokens: int = 128
    batch: int = 8
    steps: int = 300
    chunk: int = 32
    locality: float = 3e-4
    factor: float = 0.1
    stable: int = 60
    adjust: int = 6
    measured: int = 8
    prompts: int = 10
    answer: int = 200


class Decoders:
    """What the rows of one seed share."""

    def __init__(self, s: Setting, run: Run):
        self.s, self.run, self.corpus = s, run, read_corpus()
        self.held = windows(self.corpus.valid, s.tokens, s.measured * 32)
        order = sample_windows(self.corpus.train, s.steps * s.batch, s.tokens, run.seed)
        self.batches = order.reshape(s.steps, s.batch, s.tokens)
        self.kept: dict[str, tuple[Llama, Any]] = {}

    def trained(self, name: str, experts: Experts | None, losses: ExpertLosses) -> tuple[Llama, Any]:
        """(module, variables) of one kind; the dense one has as many parameters in its MLPs."""
        s = self.s
        dense = round(s.experts * (2 * s.stream * s.width + s.stream + 1) / (3 * s.stream))
        config = llama_config(256, s.stream, s.width if experts else dense, s.depth, s.heads, experts=experts)
        rates = optax.warmup_cosine_decay_schedule(0.0, 3e-3, s.steps // 20, s.steps, 3e-4)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates, 0.9, 0.95, weight_decay=0.1))
        module = Llama(config)
        folder = None if self.run.work is None else self.run.work / name.replace(" ", "-")
        found: Any = train_experts(
            module, initial_experts(config, self.run.seed), lambda k: self.batches[k], s.steps, tx, losses, out=folder,
            resume=folder is not None, progress=self.run.progress, title=f"seed {self.run.seed} {name}").state  # fmt: skip
        self.kept[name] = module, found.params
        return module, found.params

    def loss(self, module: Llama, variables: Any) -> float:
        """Nats a byte on held-back text."""
        return float(window_losses(module, variables, self.held, 32).mean())

    def row(self, name: str, experts: Experts | None, losses: ExpertLosses) -> dict[str, Any]:
        """Loss on held-back text, and how sparse the experts are there."""
        module, v = self.trained(name, experts, losses)
        out = {"loss": self.loss(module, v)}
        if experts is None:
            return out
        read = jax.jit(lambda ids: module.apply(v, ids, mutable=["routed"])[1])
        layers: list[list[np.ndarray]] = [[] for _ in range(self.s.depth)]
        for i in range(0, len(self.held), 32):
            for layer, r in zip(layers, routed_layers(read(jnp.asarray(self.held[i : i + 32]))), strict=True):
                layer.append(np.asarray(r.active))
        active = [np.concatenate(a) for a in layers]

        def mean(of: Any) -> float:
            return float(np.mean([of(a) for a in active]))

        return {
            **out, "token_sparsity": mean(lambda a: float(token_sparsity(a))),
            **{f"chunk_sparsity_{n}": mean(lambda a, n=n: chunk_sparsity(a, n)) for n in (8, 32, 128)},
            "reuse": mean(reuse), "dead": sum(len(dead_experts(a)) for a in active),
        }  # fmt: skip

    def decoded(self, name: str) -> dict[str, Any]:
        """Speculative decoding of held-back prompts: equal to decoding one by one, tokens of a pass, experts of a pass."""
        module, v = self.kept.get(name) or self.trained(name, *kinds(self.s)[name])
        prompts = self.held[:: max(1, len(self.held) // self.s.prompts)][: self.s.prompts, :64]
        equal, many, passes, used, alone = 0, 0, 0, [], []
        for p in prompts:
            said = speculate(module, v, p[None], self.s.answer)
            plain = speculate(module, v, p[None], self.s.answer, drafter=None)
            equal += int(np.array_equal(said.tokens, plain.tokens))
            many, passes = many + sum(said.accepted), passes + len(said.accepted)
            used += [u.mean() for u in said.used]
            alone += [u.mean() for u in said.used_by_one]
        return {"prompts": len(prompts), "equal": equal, "tokens_per_pass": many / passes,
                "experts_of_a_pass": float(np.mean(used)), "experts_of_a_token": float(np.mean(alone))}  # fmt: skip


def initial_experts(config: Any, seed: int) -> Any:
    """Weights whose variance is one over their inputs, experts and routers too."""
    variables = initial(config, seed)

    def scaled(path: Any, x: Any) -> Any:
        if path[-1].key in ("up", "down"):
            return x * (x.shape[1] ** -0.5 / 0.02)
        return x

    return jax.tree_util.tree_map_with_path(scaled, variables)


def kinds(s: Setting) -> dict[str, tuple[Experts | None, ExpertLosses]]:
    """{row: (experts, losses)}."""
    factor, relu = AdaptiveFactor(s.factor, s.stable, s.adjust), Experts(s.experts, ReluNorm())
    return {
        "dense": (None, ExpertLosses()),
        "TopK": (Experts(s.experts, TopK(s.active)), ExpertLosses(balance=1e-2)),
        "ReMoE": (Experts(s.experts, ReMoE(s.active)), ExpertLosses(balance=1e-5)),
        "BlockFFN": (relu, ExpertLosses(s.locality, factor, s.chunk)),
        "BlockFFN, chunks only": (relu, ExpertLosses(0.0, factor, s.chunk)),
        "BlockFFN, no losses": (relu, ExpertLosses()),
    }
