"""Zero-TPrune's stages in plain numpy, float64, one image and one token at a time, gathering instead of masking."""

import numpy as np


def signal(n, special, boost):
    weight = np.array([n**0.5 if boost and i < special else 1.0 for i in range(n)])
    return weight / weight.sum()


def votes(attn, iters, start):
    """(heads, tokens) of mean 1, of attention (heads, tokens, tokens)."""
    scores = []
    for a in np.asarray(attn, np.float64):
        s = np.array(start, np.float64)
        for _ in range(iters):
            s = np.array([sum(a[i, j] * s[i] for i in range(len(s))) for j in range(len(s))])
        scores.append(s * len(s))
    return np.array(scores)


def one_score(scores, vhf=None):
    counted = [h for h in scores if vhf is None or vhf[0] <= h.var() <= vhf[1]]
    counted = np.array(counted if counted else scores)
    return np.sqrt((counted**2).mean(0))


def order_of(score, special):
    """Places of patches, most important first."""
    return sorted(range(special, len(score)), key=lambda i: (-score[i], i))


def duplicates(score, feats, r, special):
    """Places that the similarity stage drops."""
    order = order_of(score, special)
    half = len(order) // 2
    second, first = order[: len(order) - half], order[len(order) - half :]

    def cosine(i, j):
        return feats[i] @ feats[j] / (np.linalg.norm(feats[i]) * np.linalg.norm(feats[j]))

    match = {i: max(cosine(i, j) for j in second) for i in first}
    return sorted(first, key=lambda i: (-match[i], i))[:r]


def layer(attn, feats, remove, keep, iters, special=1, boost=True, vhf=None):
    """Places that are left after one pruning layer."""
    n = attn.shape[-1]
    score = one_score(votes(attn, 1, signal(n, special, boost)), vhf)
    gone = set(duplicates(score, np.asarray(feats, np.float64), remove, special)) if remove else set()
    kept = [i for i in range(n) if i not in gone]
    small = np.asarray(attn, np.float64)[:, kept][:, :, kept]
    small = small / small.sum(-1, keepdims=True)
    score = one_score(votes(small, iters, signal(len(kept), special, boost)), vhf)
    best = order_of(score, special)[:keep]
    return kept[:special] + [kept[i] for i in sorted(best)]
