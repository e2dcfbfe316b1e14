"""Training with sparse weights: one line around any optax optimizer, and a straight-through wrapper of a loss.

    tx = sparsify(optax.adam(1e-3), 0.9, RigL(), MaskSteps("constant", start=100, end=10_000, every=100))

`sparsify` keeps the parameters sparse by itself, in any training loop. A method says which weights stay, one file each;
`MaskSteps` says when they are chosen and how sparse they are by then.
"""

from jprune.methods.weights.sparse_training.acdc import ACDC as ACDC
from jprune.methods.weights.sparse_training.magnitude import Magnitude as Magnitude
from jprune.methods.weights.sparse_training.mask_steps import MaskSteps as MaskSteps
from jprune.methods.weights.sparse_training.random import Random as Random
from jprune.methods.weights.sparse_training.rigl import RigL as RigL
from jprune.methods.weights.sparse_training.saliency import Saliency as Saliency
from jprune.methods.weights.sparse_training.set import SET as SET
from jprune.methods.weights.sparse_training.static import Static as Static
from jprune.methods.weights.sparse_training.straight_through import magnitude_masks as magnitude_masks
from jprune.methods.weights.sparse_training.straight_through import masked as masked
from jprune.methods.weights.sparse_training.transform import SparseState as SparseState
from jprune.methods.weights.sparse_training.transform import masks_of as masks_of
from jprune.methods.weights.sparse_training.transform import sparsify as sparsify
