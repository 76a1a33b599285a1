"""Heads of detectors: boxes, masks, and what is done with them after the last layer."""
