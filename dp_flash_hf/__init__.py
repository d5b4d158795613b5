"""Exact differentially private fine-tuning for Hugging Face Transformers.

Importing registers `attn_implementation="dp_flash"`.
"""

from dp_flash_hf import patches
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.attention import registration as attention_registration
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.privatize import Privatized, privatize
from dp_flash_hf.forward_privacy.report import AttentionPrivacyReport
from dp_flash_hf.forward_privacy.verify_cut import verify_cut
from dp_flash_hf.integrations.accelerate import make_private
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.layers.rules import register_rule
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.mechanisms.gaussian_noise import fresh_generator
from dp_flash_hf.reporting.report import PrivacyReport
from dp_flash_hf.training.dp_sgd import DPSGD

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
patches.load()
