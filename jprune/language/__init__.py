"""Tools for decoders: blocks, statistics, low-rank adapters, perplexity; decides on nothing."""
