"""Models on disk: orbax folders with metadata, safetensors files, Hugging Face folders; nothing is ever unpickled."""

from jprune.checkpoint.folder import load, save
from jprune.checkpoint.huggingface import PruningRecord, load_hf, load_tokenizer, save_hf
from jprune.checkpoint.tensors import load_safetensors, save_safetensors

__all__ = [
    "PruningRecord",
    "load",
    "load_hf",
    "load_safetensors",
    "load_tokenizer",
    "save",
    "save_hf",
    "save_safetensors",
]
