"""Weights: files, layouts of other projects both ways, and transfer to other sizes and windows."""

from swinscale.weights.detectors import load_detector
from swinscale.weights.files import read_state_dict, write_safetensors
from swinscale.weights.infer import infer_config
from swinscale.weights.layouts import LAYOUTS, convert_state_dict, detect_layout, from_official, to_official
from swinscale.weights.load import load_weights
from swinscale.weights.pretrained import from_pretrained, save_pretrained
from swinscale.weights.records import read_config, read_metadata
from swinscale.weights.report import LoadReport
from swinscale.weights.segmenters import load_segmenter
from swinscale.weights.transfer import transfer, transfer_config

__all__ = [
    "LAYOUTS",
    "LoadReport",
    "convert_state_dict",
    "detect_layout",
    "from_official",
    "from_pretrained",
    "infer_config",
    "load_detector",
    "load_segmenter",
    "load_weights",
    "read_config",
    "read_metadata",
    "read_state_dict",
    "save_pretrained",
    "to_official",
    "transfer",
    "transfer_config",
    "write_safetensors",
]
