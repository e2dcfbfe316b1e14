"""Diffusion: how samples are drawn, and the methods that make text-to-image models smaller."""
