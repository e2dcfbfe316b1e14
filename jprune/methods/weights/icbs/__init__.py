"""iCBS: a mask improved block by block, each a binary quadratic problem of fixed cardinality (Rosenberg et al. 2024)."""
