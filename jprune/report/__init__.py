"""What a pruning run shows: measurements before and after, plots, one page."""
