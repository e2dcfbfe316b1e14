"""Products of rows that lie sorted by group, each group with a matrix of its own: what a mixture of experts becomes once sorted.

It never sorts: how many rows belong to which group is data that the caller makes.
"""

from pallas_kernels.common.backends import BackendError, DerivativeError
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.problem import GroupError

__all__ = ["BackendError", "DerivativeError", "GroupError", "grouped_matmul"]
