"""LAPP: a learned threshold in every layer, and a cheap bypass beside it, in the first epochs of the only training."""
