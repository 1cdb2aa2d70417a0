"""Hugging Face model folders: config.json, safetensors and tokenizer.json, without PyTorch or transformers."""

from espalier.hf.reader import read
from espalier.hf.tokenizer import load_tokenizer

__all__ = ["load_tokenizer", "read"]
