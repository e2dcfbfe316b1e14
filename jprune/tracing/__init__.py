"""From a JAX function to dependency groups, the cost polynomial and taps; changes no parameter and knows no method."""
