"""Pruning of single weights by a quadratic model of the loss: WoodFisher, oBERT, CAP, CBS and CHITA.

One signature for all: `(weights, gradients, keep, config) -> Pruned(weights, masks, damp)`, where `gradients` holds every
sample's own. `second_order(name)` makes them from a loss, for all of a model at once and in several stages if asked to.
"""

from jprune.methods.weights.second_order.cap import CAPConfig as CAPConfig
from jprune.methods.weights.second_order.cap import cap as cap
from jprune.methods.weights.second_order.cbs import CBSConfig as CBSConfig
from jprune.methods.weights.second_order.cbs import cbs as cbs
from jprune.methods.weights.second_order.chita import CHITAConfig as CHITAConfig
from jprune.methods.weights.second_order.chita import chita as chita
from jprune.methods.weights.second_order.flat import Pruned as Pruned
from jprune.methods.weights.second_order.obert import OBERTConfig as OBERTConfig
from jprune.methods.weights.second_order.obert import obert as obert
from jprune.methods.weights.second_order.stages import second_order as second_order
from jprune.methods.weights.second_order.woodfisher import WoodFisherConfig as WoodFisherConfig
from jprune.methods.weights.second_order.woodfisher import woodfisher as woodfisher
