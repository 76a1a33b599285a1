"""What a Swin sees: feature maps by name, attention of a pixel, rollout, class-activation maps, and whether they hold.

The parts, each in a module of its own: ``explain_maps`` (intermediates), ``explain_attention`` (attention, rollout, distance),
``explain_cam`` (class-activation maps, integrated gradients), ``explain_deletion`` (the check of a map),
``explain_position`` (position bias and temperatures of the weights alone), ``explain_pictures`` (one picture of all).
"""

from swinscale.diagnose.explain_attention import attention, attention_distance, rollout
from swinscale.diagnose.explain_cam import cam, integrated_gradients
from swinscale.diagnose.explain_deletion import Deletion, deletion
from swinscale.diagnose.explain_maps import intermediate_names, intermediates
from swinscale.diagnose.explain_position import position_bias, temperatures

__all__ = [
    "Deletion",
    "attention",
    "attention_distance",
    "cam",
    "deletion",
    "integrated_gradients",
    "intermediate_names",
    "intermediates",
    "position_bias",
    "rollout",
    "temperatures",
]
