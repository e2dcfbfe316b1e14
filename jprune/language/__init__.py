"""Language models: what is measured of their blocks, and the methods that prune and adapt them."""
