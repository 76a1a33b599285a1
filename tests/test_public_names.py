"""The names that users may rely on. Removing one is a breaking change; adding one is a decision: change this list."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "swinscale": "SwinConfig SwinTransformer UsageError __version__ create_model from_pretrained list_models load_weights "
    "push_to_hub save_pretrained transfer",
    "swinscale.models": "LRNet LRNetConfig ModelConfig SizePlan SwinConfig SwinMLP SwinMLPConfig SwinTransformer build_model create_model "
    "list_models model_config plan",
    "swinscale.ops": "BACKENDS Backend PositionBias choose_backend window_attention",
    "swinscale.weights": "LAYOUTS LoadReport convert_state_dict detect_layout from_official from_pretrained infer_config "
    "load_detector load_segmenter load_weights read_config read_metadata read_state_dict save_pretrained to_official transfer "
    "transfer_config write_safetensors",
    "swinscale.tasks": "Batch Classify ClassifyConfig ClassifyVideo Detect DetectConfig Reconstruction Segment SegmentConfig "
    "SimMIM SimMIMConfig Task VideoConfig normalise_locally",
    "swinscale.data": "ClassList ClipDataset CocoSource CorruptImage DetectionDataset EpochLoader ImageDataset LabelRule MaskConfig Sampling SegmentDataset "
    "SegmentSource Source Timeline channel_statistics class_list clip_eval_transform clip_train_transform collate "
    "decode_image detection_eval_transform detection_train_transform eval_transform instance_mask mask_for_sample normalisation "
    "open_coco open_films open_segments open_source read_frames segment_eval_transform segment_train_transform simmim_transform split_source "
    "subset_per_class train_transform",
    "swinscale.heads": "DetectConfig Detections Detector",
    "swinscale.metrics": "CocoMetric SegmentationMetric",
    "swinscale.recipes": "Built DataConfig DetectionDataConfig RECIPES Recipe SegmentationDataConfig VideoDataConfig build get_recipe run",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str):
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module].split())
    for name in found.__all__:
        assert getattr(found, name) is not None
