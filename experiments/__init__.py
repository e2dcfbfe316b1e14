"""Experiments: one module a system, with a small configuration (minutes on a CPU) and the paper's; methods live in jprune."""
