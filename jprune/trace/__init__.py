"""Tracing: from a JAX function to dependency groups, the cost polynomial and taps."""
