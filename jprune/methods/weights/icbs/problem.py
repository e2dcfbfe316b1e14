"""The block objective: what pruning or reviving each of some weights together does to the loss, to second order.

Notation of the paper: x_i = 1 prunes weight i of the block; w0 are the trained weights, dw = w - w0 is what the current
mask has taken off. The step is delta(x) = w0 (1 - x) - w = -(dw + w0 x), and

    E(x) = a gbar.delta + 1/2 delta.H delta + ridge |delta|^2  =  c + x.Q x

with the gradient gbar at the current, pruned weights and H the empirical Fisher matrix of a batch, so that E of the
current state is 0. With a = 0 the current state is the best one: no step ever moves.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Dense(NamedTuple):
    """A quadratic form as a symmetric matrix; linear terms are its diagonal, as x_i^2 = x_i."""

    q: Float[Array, "n n"]

    def times(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """Q x."""
        return jnp.matmul(self.q, x, precision="highest")

    def diagonal(self) -> Float[Array, " n"]:
        """Q_ii."""
        return jnp.diagonal(self.q)

    def product_at(self, state: Any, i: Any, x: Any) -> Float[Array, ""]:
        """(Q x)_i from the state that a search keeps, Q x itself."""
        return state[i]

    def state(self, x: Float[Array, " n"]) -> Any:
        """What a search keeps of x."""
        return self.times(x)

    def swapped(self, state: Any, off: Any, on: Any, step: Any) -> Any:
        """The state after `off` went from 1 to 0 and `on` from 0 to 1, if step is 1; unchanged if 0."""
        return state + step * (self.q[on] - self.q[off])

    def entry(self, i: Any, j: Any) -> Float[Array, ""]:
        """Q_ij, i != j."""
        return self.q[i, j]

    def scale(self) -> Float[Array, ""]:
        """Mean |Q_ij| of the entries that are not 0."""
        size = jnp.abs(self.q)
        return jnp.sum(size) / jnp.maximum(jnp.sum(size > 0), 1)

    def scaled(self, s: Any) -> Dense:
        """s Q."""
        return Dense(self.q * s)

    def entries(self, i: Any, j: Any) -> Float[Array, "a b"]:
        """Q_ij for all i in one list and all j in another."""
        return self.q[i][:, j]


class LowRank(NamedTuple):
    """A quadratic form A A^T + diag(linear), with few columns in A: a batch's samples."""

    a: Float[Array, "n rank"]
    linear: Float[Array, " n"]

    def times(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """Q x."""
        return jnp.matmul(self.a, jnp.matmul(x, self.a, precision="highest"), precision="highest") + self.linear * x

    def diagonal(self) -> Float[Array, " n"]:
        """Q_ii."""
        return jnp.sum(self.a**2, axis=1) + self.linear

    def product_at(self, state: Any, i: Any, x: Any) -> Float[Array, ""]:
        """(Q x)_i from the state that a search keeps, A^T x."""
        return jnp.dot(self.a[i], state, precision="highest") + self.linear[i] * x

    def state(self, x: Float[Array, " n"]) -> Any:
        """What a search keeps of x: as many numbers as A has columns."""
        return jnp.matmul(x, self.a, precision="highest")

    def swapped(self, state: Any, off: Any, on: Any, step: Any) -> Any:
        """The state after `off` went from 1 to 0 and `on` from 0 to 1, if step is 1; unchanged if 0."""
        return state + step * (self.a[on] - self.a[off])

    def entry(self, i: Any, j: Any) -> Float[Array, ""]:
        """Q_ij, i != j."""
        return jnp.dot(self.a[i], self.a[j], precision="highest")

    def scale(self) -> Float[Array, ""]:
        """Root of the mean square of Q_ij: in place of the mean modulus, which needs all n^2 entries."""
        small = jnp.einsum("nr,ns->rs", self.a, self.a, precision="highest")
        square = jnp.sum(small**2) + jnp.sum(self.linear * (2 * jnp.sum(self.a**2, axis=1) + self.linear))
        return jnp.sqrt(jnp.maximum(square, 0.0)) / self.a.shape[0]

    def scaled(self, s: Any) -> LowRank:
        """s Q, for s > 0."""
        return LowRank(self.a * jnp.sqrt(s), self.linear * s)

    def entries(self, i: Any, j: Any) -> Float[Array, "a b"]:
        """Q_ij for all i in one list and all j in another."""
        same = i[:, None] == j[None, :]
        return jnp.matmul(self.a[i], self.a[j].T, precision="highest") + jnp.where(same, self.linear[i][:, None], 0.0)


Form: TypeAlias = Dense | LowRank


def energy(form: Form, x: Float[Array, " n"]) -> Float[Array, ""]:
    """x.Q x."""
    return jnp.dot(x, form.times(x), precision="highest")


def block_form(
    w0: Float[Array, " n"],
    dw: Float[Array, " n"],
    gradients: Float[Array, "samples n"],
    gbar: Float[Array, " n"],
    a: float = 1.0,
    ridge: float = 0.0,
) -> tuple[LowRank, Float[Array, ""]]:
    """(Q, c) with the Fisher matrix of these gradients, as a form of low rank.

        >>> q, c = block_form(jnp.array([1.0, -2.0]), jnp.zeros(2), jnp.eye(2) * 2**0.5, jnp.array([0.5, 1.0]))
        >>> dense(q).q.round(4).tolist()
        [[0.0, 0.0], [0.0, 4.0]]

    Args:
      w0: trained weights of the block.
      dw: current weights minus w0: -w0 where a weight is pruned now, else 0.
      gradients: of each sample's own loss at the current weights.
      gbar: mean gradient at the current weights.
      a: weight of the gradient's term.
      ridge: weight of |delta|^2, which keeps the step small.
    """
    n = gradients.shape[0]
    half = w0[:, None] * gradients.T / jnp.sqrt(2.0 * n)
    moved = jnp.matmul(gradients.T, jnp.matmul(gradients, dw, precision="highest"), precision="highest") / n
    linear, c = _linear(w0, dw, moved, gbar, a, ridge)
    return LowRank(half, linear), c


def dense(form: Form) -> Dense:
    """The same form as a matrix."""
    if isinstance(form, Dense):
        return form
    return Dense(jnp.matmul(form.a, form.a.T, precision="highest") + jnp.diag(form.linear))


def block_matrix(
    w0: Float[Array, " n"],
    dw: Float[Array, " n"],
    hessian: Float[Array, "n n"],
    gbar: Float[Array, " n"],
    a: float = 1.0,
    ridge: float = 0.0,
) -> tuple[Dense, Float[Array, ""]]:
    """(Q, c) with any Hessian; arguments as `block_form` has them."""
    linear, c = _linear(w0, dw, jnp.matmul(hessian, dw, precision="highest"), gbar, a, ridge)
    return Dense(jnp.outer(w0, w0) * hessian / 2 + jnp.diag(linear)), c


def _linear(w0: Any, dw: Any, moved: Any, gbar: Any, a: float, ridge: float) -> tuple[Any, Any]:
    """(what stands on the diagonal of Q beside the Hessian's own part, c), with `moved` = H dw."""
    linear = w0 * (moved - a * gbar + ridge * (2 * dw + w0))
    return linear, jnp.dot(dw, moved) / 2 - a * jnp.dot(dw, gbar) + ridge * jnp.dot(dw, dw)


def bend(delta: Float[Array, " n"], gradients: Float[Array, "samples n"]) -> Float[Array, ""]:
    """delta.H delta with the Fisher matrix H of these gradients."""
    return jnp.mean(jnp.matmul(gradients, delta, precision="highest") ** 2)


def step_energy(
    delta: Float[Array, " n"], bend: Float[Array, ""], gbar: Float[Array, " n"], a: float, ridge: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(E, the predicted change of the loss) of a step, from its definition; the latter leaves the ridge out.

    Args:
      delta: new weights minus current ones.
      bend: delta.H delta.
      gbar, a, ridge: as `block_form` has them.
    """
    change = a * jnp.dot(gbar, delta) + bend / 2
    return change + ridge * jnp.dot(delta, delta), change


def idle(form: Form) -> Bool[Array, " n"]:
    """True for a variable whose row of Q is 0: whatever it is, the energy is the same."""
    if isinstance(form, Dense):
        return ~jnp.any(form.q != 0, axis=1)
    return (form.linear == 0) & ~jnp.any(form.a != 0, axis=1)


def drop_negative(form: Form) -> Dense:
    """Every entry that is not above 0 set to 0: what the authors' published program does, by a threshold without modulus.

    Weights that cancel each other, and such whose removal lowers the loss, look free under it.
    """
    q = dense(form).q
    return Dense(jnp.where(q > 1e-12, q, 0.0))


def normalised(form: Form) -> tuple[Form, Float[Array, ""]]:
    """(the form over its own scale, the scale): what annealing's temperatures are for. A form of zeros stays."""
    s = form.scale()
    safe = jnp.where(s > 0, s, 1.0)
    return form.scaled(1.0 / safe), safe
