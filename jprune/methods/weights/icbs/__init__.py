"""iCBS: a mask improved block by block, each a binary quadratic problem of fixed cardinality (Rosenberg et al. 2024)."""

from jprune.methods.weights.icbs.qubo import load_qubo as load_qubo
from jprune.methods.weights.icbs.qubo import penalised as penalised
from jprune.methods.weights.icbs.qubo import read_solution as read_solution
from jprune.methods.weights.icbs.qubo import save_qubo as save_qubo
from jprune.methods.weights.icbs.run import icbs as icbs
from jprune.methods.weights.icbs.steps import ICBSConfig as ICBSConfig
from jprune.methods.weights.icbs.steps import State as State
from jprune.methods.weights.icbs.steps import StepInfo as StepInfo
from jprune.methods.weights.icbs.steps import initial as initial
from jprune.methods.weights.icbs.steps import orders_of as orders_of
from jprune.methods.weights.icbs.steps import schedule as schedule
from jprune.methods.weights.icbs.steps import step as step
