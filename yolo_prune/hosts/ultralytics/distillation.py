"""The host's distillation around a network that loses channels: its hooks, and the projectors that read the necks.

The host wraps the network that is trained (the student) together with its teacher, looks into both by forward hooks,
and learns a small projector from each level of the student's neck to the teacher's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils.torch_utils import unwrap_model

from yolo_prune.channels import BoolArray, ChannelGraph
from yolo_prune.hosts.ultralytics.networks import network_of
from yolo_prune.surgery.apply import selected


def optimized_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what the host's optimizer holds, by the names that `with_projectors` knows: the teacher is there too."""
    inner: Any = unwrap_model(model)
    found = dict(network_of(model).named_parameters())
    if isinstance(inner, DistillationModel):
        for name in ("projector", "teacher_model"):
            found |= dict(getattr(inner, name).named_parameters(prefix=name))
    return found


def with_projectors(graph: ChannelGraph, model: nn.Module) -> ChannelGraph:
    """Return a channel graph that knows what a projector reads: the level of the neck that the head reads too.

    Args:
        graph: Channel graph of the network.
        model: The host's model around it; where it does not distil, the graph is returned as it is.
    """
    inner: Any = unwrap_model(model)
    if not isinstance(inner, DistillationModel):
        return graph
    head = f"model.{inner.feats_idx[-1]}"
    levels = range(len(inner.projector))
    read = {(f"projector.{level}.0.weight", 1): graph.axes[f"{head}.cv2.{level}.0.conv.weight", 1] for level in levels}
    return dataclasses.replace(graph, axes={**graph.axes, **read})


def distilled_by(dense: nn.Module, slim: nn.Module, graph: ChannelGraph, keep: BoolArray) -> nn.Module:
    """Wrap a slim network as a dense one is wrapped; the network itself where the dense one is not.

    Args:
        dense: The host's model, whose projectors go on with the channels that are kept.
        slim: The slim network that takes the student's place.
        graph: Channel graph of the dense network, `with_projectors`.
        keep: Keep mask of shape (channels,).
    """
    inner: Any = unwrap_model(dense)
    if not isinstance(inner, DistillationModel):
        return slim
    wrapper = DistillationModel(teacher_model=inner.teacher_model, student_model=slim)
    wrapper.projector.load_state_dict(projectors(inner, graph, keep))
    return wrapper


def projectors(model: Any, graph: ChannelGraph, keep: BoolArray) -> dict[str, Any]:
    """Return the state of a wrapper's projectors without the channels that go."""
    return {
        name: selected(graph, keep, f"projector.{name}", tensor.cpu())
        for name, tensor in model.projector.state_dict().items()
    }
