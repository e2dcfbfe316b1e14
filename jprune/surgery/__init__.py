"""From a decision to arrays and functions: masked, compacted, replayed, grafted; never decides what goes."""
