"""What every run of the command line imports. The process that the runs are forked from imports it once for all of them."""

from __future__ import annotations

import importlib
import os

os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on the number of threads, and the tests compare them to the last bit

import torch
import torch.distributed.elastic.multiprocessing.errors
import torch.utils.tensorboard

import swinscale.cli
import swinscale.data.shards
import swinscale.recipes
import swinscale.runlog  # noqa: F401
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
importlib.import_module("torchmetrics.classification")  # imports torchvision
torch.set_num_threads(1)
