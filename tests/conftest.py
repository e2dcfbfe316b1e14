"""Hypothesis repeats the same examples in every run: a test that failed once fails again."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
