"""Differentially private fine-tuning for Hugging Face Transformers; importing registers attn_implementation="dp_flash"."""

from dp_flash_hf.engine import ClippingEngine
from dp_flash_hf.patches import t5, vit

__all__ = ["ClippingEngine", "t5", "vit"]
