"""PreCrop and PreConfig: widths from densities at initialisation, before anything is trained."""
