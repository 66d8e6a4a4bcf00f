"""Filter grafting: filters that do nothing are revived instead of removed.

Source: Meng et al., Filter Grafting for Deep Neural Networks, CVPR 2020. Three kinds of scions: another network that is
trained beside (eq. 6 and 7, and the authors' code), noise, and the network's own strong filters.

Where this follows the specification rather than the authors' code: a histogram's largest value belongs to its last bin
(theirs drops it), and the weight of the own layer is not rounded to two digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from yolo_prune.errors import ConfigError

MODES = ("external", "internal", "noise")
"""Where scions come from."""

BINS = 10
"""Bins of the histogram whose entropy says how much a layer knows."""

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
"""What of a batch norm follows its convolution; the count of its batches is no weight."""


@dataclass(frozen=True, kw_only=True)
class Grafting:
    """How filters are revived.

    Attributes:
        mode: A name in `MODES`.
        nets: Networks that are trained side by side; for `external` alone.
        amplitude: A of the own layer's weight, which stays within 0.5 - A/2 and 0.5 + A/2.
        sharpness: c of it: how soon a difference of entropies decides.
        noise_base: a of `noise`: its standard deviation at epoch t is a^t.
        threshold: For `noise` and `internal`, a filter is invalid if its L1 norm is below this fraction of its layer's
            mean. The paper's is absolute, but a batch norm makes the scale of a layer's filters meaningless, so that
            no number would serve two layers; and a share of the filters would call some invalid in every layer.

    Raises:
        ConfigError: A value that is unknown or out of range.
    """

    mode: str = "external"
    nets: int = 2
    amplitude: float = 0.4
    sharpness: float = 500.0
    noise_base: float = 0.5
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"grafting.mode={self.mode}", expected=f"one of {', '.join(MODES)}")
        if self.nets < 2:
            raise ConfigError(f"grafting.nets={self.nets}", expected="2 or more networks side by side")
        for name, value, most in (
            ("amplitude", self.amplitude, 1.0),
            ("sharpness", self.sharpness, math.inf),
            ("noise_base", self.noise_base, 1.0),
            ("threshold", self.threshold, 1.0),
        ):
            if not 0.0 < value < most:
                limit = "" if most == math.inf else f" and below {most:g}"
                raise ConfigError(f"grafting.{name}={value}", expected=f"a number above 0{limit}")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution whose filters are grafted.

    Attributes:
        conv: Its module path.
        norm: Module path of the batch norm behind it; None without one.
    """

    conv: str
    norm: str | None

    def tensors(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return the state-dict names of what is blended, as far as the network has them."""
        names = [f"{self.conv}.weight", f"{self.conv}.bias"]
        names += [f"{self.norm}.{name}" for name in NORM_TENSORS] if self.norm else []
        return [name for name in names if name in state]


def layers_of(model: nn.Module, norms: Mapping[str, str]) -> list[Layer]:
    """Return every convolution of a network that learns; what is frozen, as a constant layer is, stays as it is.

    Args:
        model: The network that is trained.
        norms: Batch-norm module path for each convolution module path that directly feeds one, as a channel graph has.
    """
    return [
        Layer(conv=path, norm=norms.get(path))
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.requires_grad
    ]


def entropy(weights: Tensor) -> float:
    """Return the entropy, in nats, of a histogram of a layer's weights between their least and their largest.

    Equation 7. A layer whose weights are all alike has entropy 0, and none has more than log(10).
    """
    counts, _ = np.histogram(weights.detach().cpu().double().numpy(), bins=BINS)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def own_weight(own: float, other: float, *, amplitude: float, sharpness: float) -> float:
    """Return alpha, the weight of the own layer, from the entropies of both; equation 6.

    Of two networks that graft onto each other the weights add up to 1, and equal entropies give 0.5.
    """
    return amplitude / math.pi * math.atan(sharpness * (own - other)) + 0.5


def graft_cyclically(
    networks: Sequence[Sequence[nn.Module]], layers: Sequence[Layer], options: Grafting
) -> list[dict[str, float] | None]:
    """Blend, in place, each network with the one before it, the first with the last; all as they were before.

    Args:
        networks: For each network what changes alike: the one that is trained, whose entropies decide, and its
            average. All of the same shapes.
        layers: The convolutions that are grafted.
        options: Amplitude and sharpness.

    Returns:
        For each network the weight of its own layer by convolution; None where nothing was blended, because its own
        values or the giver's are not finite.
    """
    before = [[_values(model, layers) for model in together] for together in networks]
    finite = [all(bool(value.isfinite().all()) for state in states for value in state.values()) for states in before]
    entropies = [
        {layer.conv: entropy(states[0][f"{layer.conv}.weight"]) for layer in layers} if whole else {}
        for states, whole in zip(before, finite, strict=True)
    ]
    weights: list[dict[str, float] | None] = []
    for index, together in enumerate(networks):
        giver = index - 1
        if not (finite[index] and finite[giver]):
            weights.append(None)
            continue
        chosen = {
            path: own_weight(own, entropies[giver][path], amplitude=options.amplitude, sharpness=options.sharpness)
            for path, own in entropies[index].items()
        }
        for model, scions in zip(together, before[giver], strict=True):
            blend(model, scions, layers, chosen)
        weights.append(chosen)
    return weights


@torch.no_grad()
def blend(
    model: nn.Module, scions: Mapping[str, Tensor], layers: Sequence[Layer], weights: Mapping[str, float]
) -> None:
    """Set, in place, each layer to alpha * own + (1 - alpha) * other; its batch norm follows.

    Equal values stay bit by bit what they are. Integers, such as the number of batches, are left alone.

    Args:
        model: The network that receives.
        scions: The giver's tensors by name.
        layers: Which layers.
        weights: Alpha of each layer by the path of its convolution.
    """
    state = model.state_dict()
    for layer in layers:
        for name in layer.tensors(state):
            own = state[name]
            own.copy_(torch.lerp(scions[name].to(own), own, weights[layer.conv]))


def _values(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[name].detach().clone() for layer in layers for name in layer.tensors(state)}


def filter_layers(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers within which one filter may be grafted onto another, or noise onto one.

    Those without a batch norm are the network's outputs: a class's filter on that of another class would make both
    fire. The filters of grouped convolutions do not read the same channels.
    """
    modules = dict(model.named_modules())
    convs = {path: module for path, module in modules.items() if isinstance(module, nn.Conv2d)}
    return [layer for layer in layers if layer.norm and layer.conv in convs and convs[layer.conv].groups == 1]


def invalid_filters(weight: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return a layer's invalid filters, the smallest first, at most half of all, and as many of the largest.

    Args:
        weight: Shape (filters, ...).
        threshold: Fraction of the layer's mean L1 norm below which a filter is invalid.

    Returns:
        Two index vectors of shape (invalid filters,): the i-th smallest and the i-th largest filters; none is in both.
    """
    norms = weight.detach().abs().flatten(1).sum(1)
    order = norms.argsort(stable=True)
    count = min(int((norms < threshold * norms.mean()).sum()), len(norms) // 2)
    return order[:count], order.flip(0)[:count]


@torch.no_grad()
def graft_internally(models: Sequence[nn.Module], layers: Sequence[Layer], threshold: float) -> int:
    """Add, in place, the i-th largest filter by L1 norm to the i-th smallest, where that is invalid.

    A revived filter's output is the sum of both outputs, so the running mean behind it is the sum of both exactly, and
    the running variance as far as they are uncorrelated: validation, which comes next, would see stale ones.

    Args:
        models: The network that is trained, whose norms decide, and its average.
        layers: As `filter_layers` returns them.
        threshold: See `invalid_filters`.

    Returns:
        Number of filters that were revived.
    """
    revived = 0
    states = [model.state_dict() for model in models]
    for layer in layers:
        small, large = invalid_filters(states[0][f"{layer.conv}.weight"], threshold)
        for state in states:
            for name in (f"{layer.conv}.weight", f"{layer.conv}.bias", *_statistics(layer)):
                if name in state:
                    state[name][small] += state[name][large]
        revived += len(small)
    return revived


@torch.no_grad()
def graft_noise(
    models: Sequence[nn.Module], layers: Sequence[Layer], threshold: float, *, deviation: float, seed: int
) -> int:
    """Add, in place, Gaussian noise to invalid filters, the same to every model.

    Args:
        models: The network that is trained, whose norms decide, and its average.
        layers: As `filter_layers` returns them.
        threshold: See `invalid_filters`.
        deviation: Standard deviation of the noise.
        seed: Seed of a generator of its own, so that nothing else that is random changes.

    Returns:
        Number of filters that were revived.
    """
    generator = torch.Generator().manual_seed(seed)
    revived = 0
    states = [model.state_dict() for model in models]
    for layer in layers:
        name = f"{layer.conv}.weight"
        small, _ = invalid_filters(states[0][name], threshold)
        noise = deviation * torch.randn(states[0][name][small].shape, generator=generator)
        for state in states:
            state[name][small] += noise.to(state[name])
        revived += len(small)
    return revived


def _statistics(layer: Layer) -> tuple[str, str]:
    return f"{layer.norm}.running_mean", f"{layer.norm}.running_var"
