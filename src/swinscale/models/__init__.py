"""Swin Transformer V1 and V2 as plain PyTorch modules. Needs torch and numpy alone."""

from swinscale.models.config import SwinConfig
from swinscale.models.plan import SizePlan, plan
from swinscale.models.swin import SwinTransformer
from swinscale.models.variants import create_model, list_models, model_config

__all__ = ["SizePlan", "SwinConfig", "SwinTransformer", "create_model", "list_models", "model_config", "plan"]
