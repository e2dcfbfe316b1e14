"""Models on disk: orbax folders with their metadata, and safetensors files; nothing is ever unpickled."""

from jprune.checkpoint.folder import load, save
from jprune.checkpoint.tensors import load_safetensors, save_safetensors

__all__ = ["load", "load_safetensors", "save", "save_safetensors"]
