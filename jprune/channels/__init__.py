"""Channel pruning methods: each file reads like its paper's algorithm box."""
