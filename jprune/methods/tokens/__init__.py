"""Fewer tokens for transformers that are trained already: which to drop, which to merge, and where; trains nothing."""
