"""Exact differentially private fine-tuning for Hugging Face Transformers.

Importing registers `attn_implementation="dp_flash"`.
"""

from dp_flash_hf import attention_registration, patching
from dp_flash_hf.accountant import PrivacyPlan
from dp_flash_hf.attention_privacy import AttentionPrivacy, AttentionPrivacyReport
from dp_flash_hf.callback import DPCallback
from dp_flash_hf.config import PrivacyConfig
from dp_flash_hf.engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.layers import register_rule
from dp_flash_hf.mechanism import DPSGD
from dp_flash_hf.noise import fresh_generator
from dp_flash_hf.private import make_private
from dp_flash_hf.privatizing import Privatized, privatize, verify_cut
from dp_flash_hf.report import PrivacyReport

__version__ = "0.1.0"
__all__ = [
    "DPSGD",
    "AttentionPrivacy",
    "AttentionPrivacyReport",
    "ClippingEngine",
    "DPCallback",
    "PrivacyConfig",
    "PrivacyError",
    "PrivacyPlan",
    "PrivacyReport",
    "Privatized",
    "UnsupportedError",
    "fresh_generator",
    "make_private",
    "privatize",
    "register_rule",
    "verify_cut",
]

attention_registration.register()
patching.register()
