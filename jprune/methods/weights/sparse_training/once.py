"""A change of arrays that is made at few steps of a loop and costs nothing at the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def once(due: Any, change: Callable[[Any, Any], Any], state: Any, others: Any) -> Any:
    """`change(state, others)` if it is due, otherwise the state, in the state's own memory.

    A loop that turns once or not at all. `lax.cond` would copy a state that its branch reads beside the new one, also at
    steps at which the branch is not taken; a loop keeps such copies inside. Under vmap a conditional runs its branch
    always; the loop runs when it is due for one of the members. Derivatives are those of the conditional, because a loop
    has none in reverse.

    >>> double = lambda x, times: x * times
    >>> [float(once(jnp.array(due), double, jnp.array(3.0), jnp.array(2.0))) for due in (True, False)]
    [6.0, 3.0]

    Args:
      due: a bool, perhaps traced.
      change: makes a state like the one it is given, of this and the others.
      state: arrays.
      others: arrays that the change reads; what it closes over has no derivative.
    """

    @jax.custom_jvp
    def run(due: Any, state: Any, others: Any) -> Any:
        def turn(carry: Any) -> Any:
            return jnp.zeros((), bool), change(carry[1], others)

        return lax.while_loop(lambda carry: carry[0], turn, (due, state))[1]

    def either(due: Any, state: Any, others: Any) -> Any:
        return lax.cond(due, change, lambda state, _: state, state, others)

    run.defjvp(lambda primals, tangents: jax.jvp(either, primals, tangents))
    return run(due, state, others)
