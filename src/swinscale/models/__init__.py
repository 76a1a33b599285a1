"""Swin Transformer V1 and V2, SwinMLP and LR-Net as plain PyTorch modules. Needs torch and numpy alone."""

from swinscale.models.config import SwinConfig
from swinscale.models.lrnet import LRNet
from swinscale.models.lrnet_config import LRNetConfig
from swinscale.models.plan import SizePlan, plan
from swinscale.models.swin import SwinTransformer
from swinscale.models.swin_mlp import SwinMLP, SwinMLPConfig
from swinscale.models.variants import ModelConfig, build_model, create_model, list_models, model_config

__all__ = [
    "LRNet",
    "LRNetConfig",
    "ModelConfig",
    "SizePlan",
    "SwinConfig",
    "SwinMLP",
    "SwinMLPConfig",
    "SwinTransformer",
    "build_model",
    "create_model",
    "list_models",
    "model_config",
    "plan",
]
