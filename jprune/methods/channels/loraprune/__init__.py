"""LoRAPrune: heads and channels scored by the gradients of low-rank adapters while these are trained."""
