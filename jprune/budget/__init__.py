"""How much goes where: targets, allocation of units to them, schedules, measured latency; scores nothing and cuts nothing."""

from jprune.budget.allocate import Allocation as Allocation
from jprune.budget.allocate import allocate as allocate
from jprune.budget.allocate import isomorphic as isomorphic
from jprune.budget.allocate import ranked as ranked
from jprune.budget.allocate import uniform as uniform
from jprune.budget.latency import LatencyTable as LatencyTable
from jprune.budget.latency import measure_latency as measure_latency
from jprune.budget.rounding import channel_counts as channel_counts
from jprune.budget.rounding import proportional_ranks as proportional_ranks
from jprune.budget.schedules import Schedule as Schedule
from jprune.budget.target import Target as Target
from jprune.budget.weights import choose as choose
from jprune.budget.weights import counts as counts
