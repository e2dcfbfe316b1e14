"""jprune: prune any JAX model. Trace a function once; then score, allocate, mask, compact."""

from jprune.graph import Graph as Graph
from jprune.graph import trace as trace
from jprune.surgery.plan import Plan as Plan
from jprune.trace.analysis import Rule as Rule
from jprune.trace.errors import KeepError as KeepError
from jprune.trace.errors import NotPrunable as NotPrunable
from jprune.trace.errors import TraceError as TraceError
from jprune.trace.rules import register_rule as register_rule
from jprune.trace.structure import Group as Group
from jprune.version import __version__ as __version__
