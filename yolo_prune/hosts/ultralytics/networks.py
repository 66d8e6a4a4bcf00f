"""The network that a host's model is made of, below what it is wrapped in while it is trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.distill_model import DistillationModel, FeatureHook
from ultralytics.utils.torch_utils import unwrap_model

from yolo_prune.surgery.equivalence import image_channels


def network_of(model: nn.Module) -> Any:
    """Return the network that is trained: without wrappers for several GPUs, compilation or distillation."""
    inner = unwrap_model(model)
    return getattr(inner, "student_model", inner)


def bare_copy(model: nn.Module) -> Any:
    """Return a float32 copy of the network in a model, on the CPU and in evaluation mode, without the host's hooks.

    What the hooks saw goes, from the original too: it belongs to the last batch, and part of a graph cannot be copied.
    """
    network = network_of(model)
    for module in network.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, FeatureHook):
                hook.feat_dict.clear()
    result: Any = copy.deepcopy(network).cpu().float().eval()
    for module in result.modules():
        DistillationModel._clear_feature_hooks(module)
    return result


def random_image(model: nn.Module, side_px: int) -> Tensor:
    """Return one fp64 image (1, channels, side, side) of noise, always the same, for a network."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, image_channels(model), side_px, side_px, generator=generator, dtype=torch.float64)
