"""MaskSparsity: a penalty on the scales of just those channels that will go."""
