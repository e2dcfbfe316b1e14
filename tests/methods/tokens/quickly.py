"""Compiled as one program and without optimisation: for small arrays, compiling takes longer than running."""

import functools

import jax

QUICKLY = {"xla_backend_optimization_level": 0}


def quickly(fn, *static):
    """fn under jit; `static` names its arguments that are no arrays."""
    return functools.partial(jax.jit, static_argnames=static, compiler_options=QUICKLY)(fn)
