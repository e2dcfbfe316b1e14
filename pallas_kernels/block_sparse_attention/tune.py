"""Which configuration is the fastest here: measured on the present device, kept in a file, never guessed from another one.

`blocks_together` is what can be said without a measurement: how many neighbouring query blocks a TPU program best takes as
one, from how alike their lists are. `tune` measures; what it tries follows from the implementation, and on TPU from that model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention.api import OPERATION, block_sparse_attention
from pallas_kernels.common.attention_arguments import AttentionError, default_scale, to_bhld
from pallas_kernels.common.attention_problem import KernelConfig, Static, Tokens
from pallas_kernels.common.block_mask import BlockMask

OVERHEAD = 56.0  # queries: what a fetched key costs a TPU program whatever its queries, by the compiler's schedules
ROWS = 512  # queries of a program: more do not fit its registers and buffers


def blocks_together(mask: BlockMask, *, overhead: float = OVERHEAD, ridge: float = 0.0) -> int:
    """How many neighbouring query blocks a TPU program best takes as one: 1, 2, 4 or 8. Host-side.

    The model: every key block in the union of their lists costs a program max(overhead + its queries, ridge). Lists that
    are alike make few and large unions; lists that have nothing in common make unions of pairs that are masked.

    Args:
      overhead: the cost of a key block besides its products, in queries.
      ridge: where keys come from HBM, the chip's operations per byte (v5e 240, v5p 187, v6e 561); 0 where they are in VMEM.
    """
    return _by_cost(mask, overhead, ridge)[0]


def _by_cost(mask: BlockMask, overhead: float = OVERHEAD, ridge: float = 0.0) -> list[int]:
    active = np.asarray(mask.to_dense())
    cost = {}
    for n in (1, 2, 4, 8):
        if n == 1 or (n * mask.block_q <= ROWS and n < 2 * mask.q_blocks):
            rows = np.pad(active, ((0, 0), (0, 0), (0, -active.shape[2] % n), (0, 0)))
            unions = rows.reshape(*active.shape[:2], -1, n, active.shape[3]).any(3).sum()
            cost[n] = int(unions) * max(overhead + n * mask.block_q, ridge)
    return sorted(cost, key=lambda n: (cost[n], n))


def candidates(impl: str, mask: BlockMask) -> tuple[KernelConfig, ...]:
    """The configurations worth a measurement; the first is what the kernels take by default."""
    default = KernelConfig()
    if impl == "tpu":
        best = _by_cost(mask)[:2]
        more = [KernelConfig(blocks_together=n, step_tokens=step) for n in best for step in (512, 1024)]
    elif impl == "xla":
        steps = {min(step, mask.width * mask.block_k) // mask.block_k * mask.block_k for step in (512, 2048)} - {0}
        rows = (1, 4) if jax.default_backend() == "cpu" else (8, 32, 64)
        more = [KernelConfig(step_tokens=s, rows_at_once=r) for s in (None, *sorted(steps)) for r in rows]
    else:
        more = []  # nothing that these kernels read
    return tuple(dict.fromkeys((default, *more)))


@no_type_check  # at run time: what it says of wrong arguments is its own
def tune(
    q: Float[Array, "b m n d"],
    k: Float[Array, "b s t d"],
    v: Float[Array, "b s t e"],
    mask: BlockMask,
    *,
    impl: str = "auto",
    configs: Sequence[KernelConfig] | None = None,
    gradients: bool = False,
    rounds: int = 7,
    cache: str | os.PathLike[str] | None = None,
    **options: Any,
) -> KernelConfig:
    """The configuration whose median time on the present device is the smallest. Host-side; results are the same with all.

    Every candidate is compiled and run once, then all take turns for `rounds` rounds, so that a busy machine slows each of
    them. The answer is kept in a file, and found there by the next call for the same device, versions, shapes, rules and
    density of the mask (to a tenth).

    Args:
      impl: as in `block_sparse_attention`. configs: what to try; by default `candidates` of the implementation.
      gradients: time the gradients of q, k and v as well.
      cache: the folder; ~/.cache/jprune/attention by default.
      options: the other arguments of `block_sparse_attention` (causal, kv_len, layout and so on).

    Raises:
      AttentionError, BackendError: as `block_sparse_attention`, or no candidate compiles; `config` among the options.
    """
    if "config" in options or rounds < 1 or (configs is not None and not configs):
        raise AttentionError("tune wants at least one candidate and one round, and finds the config itself: "
                             "leave config out, and give what to try as configs=[...]")  # fmt: skip
    query, key, value = (to_bhld(x, options.get("layout", "bhld")) for x in (q, k, v))
    scale = default_scale(query, options.get("scale"))
    static = Static(scale, None, mask.block_q, mask.block_k, KernelConfig(), options.get("interpret", False))
    chosen = OPERATION.choose(impl, static, query, key, value, Tokens(), interpret=static.interpret)
    tried = tuple(configs) if configs is not None else candidates(chosen, mask)
    if len(tried) == 1:
        return tried[0]
    problem = _key(chosen, (q, k, v), mask, tried, gradients, options)
    folder = Path(cache) if cache is not None else Path.home() / ".cache" / "jprune" / "attention"
    path = folder / f"{hashlib.sha256(json.dumps(problem, sort_keys=True).encode()).hexdigest()[:24]}.json"
    known = _read(path, problem, tried)
    if known is not None:
        return known
    mask = mask.with_transpose() if gradients and mask.q_idx is None else mask
    jobs: dict[KernelConfig, Callable[[], Any]] = {}
    problems = []
    for config in tried:
        run = _program(config, gradients, chosen, options)
        try:
            jax.block_until_ready(run(q, k, v, mask))
        except Exception as error:  # of a compiler that has no room for it: which error that is differs by device
            problems.append(f"{config}: {error}")
            continue
        jobs[config] = jax.tree_util.Partial(run, q, k, v, mask)
    if not jobs:
        raise AttentionError("no configuration runs: " + "; ".join(problems))
    seconds = {config: statistics.median(times) for config, times in _in_turns(jobs, rounds).items()}
    best = min(seconds, key=lambda config: seconds[config])
    _write(path, {
        "key": problem,
        "config": dataclasses.asdict(best),
        "seconds": [[dataclasses.asdict(config), s] for config, s in seconds.items()],
        "failed": problems,
    })  # fmt: skip
    return best


def _program(config: KernelConfig, gradients: bool, impl: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    def attend(q: Any, k: Any, v: Any, mask: BlockMask) -> Any:
        return block_sparse_attention(q, k, v, mask, impl=impl, config=config, **options)

    def both(q: Any, k: Any, v: Any, mask: BlockMask) -> Any:
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return out, back(jax.tree.map(jnp.ones_like, out))

    return jax.jit(both if gradients else attend)


def _in_turns(jobs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of every job in every round; every other round goes backwards."""
    out: dict[Any, list[float]] = {name: [] for name in jobs}
    for n in range(rounds):
        for name in list(jobs) if n % 2 == 0 else reversed(list(jobs)):
            began = time.perf_counter()
            jax.block_until_ready(jobs[name]())
            out[name].append(time.perf_counter() - began)
    return out


def _key(impl: str, arrays: Sequence[Any], mask: BlockMask, tried: Sequence[KernelConfig], gradients: bool,
         options: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    device = jax.devices()[0]
    plain = (str, bool, type(None))
    return {
        "device": [device.platform, device.device_kind],
        "jax": jax.__version__,
        "impl": impl,
        "arrays": [[list(x.shape), str(x.dtype)] for x in arrays],
        "blocks": [mask.block_q, mask.block_k, mask.q_size, mask.kv_size],
        "lists": [list(mask.kv_idx.shape), round(float(mask.density()), 1)],
        "tried": [dataclasses.asdict(config) for config in tried],
        "gradients": gradients,
        "options": {name: x if isinstance(x, plain) else type(x).__name__ for name, x in sorted(options.items())},
    }


def _read(path: Path, key: Mapping[str, Any], tried: Sequence[KernelConfig]) -> KernelConfig | None:
    """What a file says, or None where there is none or it cannot be believed, with a warning."""
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text())
        config = KernelConfig(**kept["config"])
        if kept["key"] == key and config in tried:
            return config
        reason = "it is of another problem"
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"{path} is measured anew, {reason}", stacklevel=3)
    return None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)  # whole or not at all, whoever else writes it
