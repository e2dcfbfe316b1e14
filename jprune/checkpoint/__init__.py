"""Models on disk: orbax folders with metadata, safetensors files, Hugging Face folders; nothing is ever unpickled."""

from jprune.checkpoint.folder import load, save
from jprune.checkpoint.huggingface import PruningRecord, load_hf, load_tokenizer, save_hf
from jprune.checkpoint.tensors import load_safetensors, save_safetensors
from jprune.checkpoint.torch import from_torch, load_torch

__all__ = [
    "PruningRecord",
    "from_torch",
    "load",
    "load_hf",
    "load_safetensors",
    "load_tokenizer",
    "load_torch",
    "save",
    "save_hf",
    "save_safetensors",
]
