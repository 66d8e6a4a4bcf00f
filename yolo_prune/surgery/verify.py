"""Proof that a slim model is what its plan promised.

Two things are shown. Each tensor of the slim model holds, bit for bit, the entries that the plan keeps. And such a
selection changes nothing: in fp64, the dense model with the removed channels silenced at their producers only gives the
same outputs as its selection. The second is shown on weights whose norms were given random scales and shifts and
statistics measured anew, so that every channel carries signal: a barely trained network would agree with anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolo_prune.channels import BoolArray, ChannelGraph, Host
from yolo_prune.channels.counting import CallCounter
from yolo_prune.channels.forward import forward_unchanged, output_tensors, same_random_numbers
from yolo_prune.channels.tensors import named_tensors
from yolo_prune.errors import VerificationError
from yolo_prune.surgery.apply import selected
from yolo_prune.surgery.copying import copied
from yolo_prune.surgery.mask import silence

TOLERANCE = 1e-9
"""Largest allowed |silenced - sliced| in fp64."""

RELATIVE_TOLERANCE = 1e-6
"""Largest allowed |silenced - sliced| as a fraction of how much the outputs respond to the image."""

WEAKEST_RESPONSE = 1e-6
"""Least response of the outputs to the image with which agreement counts as a proof."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the proof found.

    Attributes:
        max_abs_error: max |silenced - sliced| over all outputs, in training and inference structure, fp64.
        response: max |outputs of one image - outputs of another| of the reference, fp64: how much there was to prove.
        macs_predicted: MACs of the closed form at `imgsz_px`.
        macs_counted: MACs that were counted while the deployed slim model ran at `imgsz_px`.
        params_predicted: Parameters of the closed form.
        params_counted: Parameters that the slim model holds.
        imgsz_px: Side of the image that the proof ran on.
    """

    max_abs_error: float
    response: float
    macs_predicted: int
    macs_counted: int
    params_predicted: int
    params_counted: int
    imgsz_px: int

    def require(self) -> Verification:
        """Return self, or raise `VerificationError` if anything differs."""
        if not self.response >= WEAKEST_RESPONSE:
            raise VerificationError(
                f"the outputs hardly depend on the image (they change by {self.response:.1e})",
                expected=f"at least {WEAKEST_RESPONSE:g}: with weights as weak as these, agreement proves nothing",
                remedy="train the model before it is pruned; nothing was saved",
            )
        if not self.max_abs_error <= min(TOLERANCE, RELATIVE_TOLERANCE * self.response):  # also catches NaN
            raise VerificationError(
                f"max |silenced - sliced| = {self.max_abs_error:.3e}",
                expected=f"at most {TOLERANCE:g} in fp64: the removed channels still mattered to something",
                remedy="nothing was saved; please report the model's yaml",
            )
        for unit, predicted, counted in (
            ("MACs", self.macs_predicted, self.macs_counted),
            ("parameters", self.params_predicted, self.params_counted),
        ):
            if predicted != counted:
                raise VerificationError(
                    f"{counted} {unit} counted",
                    expected=f"{predicted}, as predicted",
                    remedy="nothing was saved; a layer whose size follows another law needs a rule: please report it",
                )
        return self


class Verifier:
    """Proves any number of slim copies of one dense model; the fp64 reference is made once.

    Args:
        dense: The model that is sliced; it must not change meanwhile.
        graph: Its channel graph.
        host: Picks the outputs that are compared.
        deployed: Returns what is deployed of a model (layers merged, training branches dropped); may change its
            argument, which is a copy.
        seed: Seed of the random input image.

    Raises:
        VerificationError: The model does not run on two images at once, which its statistics are measured on.
    """

    def __init__(
        self,
        dense: nn.Module,
        graph: ChannelGraph,
        *,
        host: Host | None = None,
        deployed: Callable[[nn.Module], nn.Module] = lambda model: model,
        seed: int = 0,
    ) -> None:
        self._dense, self._graph, self._host, self._deployed = dense, graph, host or Host(), deployed
        self._reference = copied(dense).double()
        side, generator = graph.cost.imgsz_px, torch.Generator().manual_seed(seed)
        self._image = torch.rand(1, graph.image_channels, side, side, generator=generator, dtype=torch.float64)
        images = torch.cat([self._image, 1.0 - self._image])
        try:
            enliven(self._reference, images, generator)
        except Exception as error:
            raise VerificationError(
                f"the model's forward failed on two images, of shape {tuple(images.shape)}: {error}",
                expected="a model that takes any number of images",
                remedy="replace sizes that are written into the forward by those of its input",
            ) from error
        self._lively = {name: tensor.detach().clone() for name, tensor in named_tensors(self._reference).items()}

    def verify(self, slim: nn.Module, keep: BoolArray) -> Verification:
        """Compare a slim copy with the silenced dense model, and its counted cost with the predicted one.

        Args:
            slim: The result of `apply`; it is left as it is.
            keep: Keep mask of shape (channels,).

        Raises:
            VerificationError: A tensor is not what the plan selects, the slim model does not run, or its outputs differ
                in number or shape.
        """
        self._require_selection(slim, keep)
        lively = {name: selected(self._graph, keep, name, self._lively[name]) for name in named_tensors(slim)}
        candidate = copied(slim, lively).double()  # a host may keep tensors of its own beside
        with torch.no_grad():
            for name, tensor in named_tensors(self._reference).items():
                tensor.copy_(self._lively[name])
        silence(self._reference, self._graph, keep)
        errors, responses = zip(
            *(self._compare(candidate, training=training) for training in (False, True)), strict=True
        )
        kept = self._graph.kept_widths(keep)
        side, counted = self._counted_macs(candidate.float())
        return Verification(
            max_abs_error=max(errors),
            response=min(responses),
            macs_predicted=round(float(self._graph.cost.macs(kept, imgsz_px=side))),
            macs_counted=counted,
            params_predicted=round(float(self._graph.cost.params(kept))),
            params_counted=sum(parameter.numel() for parameter in slim.parameters()),
            imgsz_px=side,
        )

    def _require_selection(self, slim: nn.Module, keep: BoolArray) -> None:
        """Raise unless each tensor of the slim model holds exactly the kept entries of the dense one."""
        dense, found = named_tensors(self._dense), named_tensors(slim)
        for name in sorted(dense.keys() | found.keys()):
            expected = selected(self._graph, keep, name, dense[name]) if name in dense else None
            if expected is None or name not in found or not torch.equal(expected, found[name]):
                raise VerificationError(
                    f"'{name}' of the slim model is not what the plan selects", expected="kept entries"
                )

    def _compare(self, candidate: nn.Module, *, training: bool) -> tuple[float, float]:
        """Return how far the candidate's outputs are off, and how much the reference's depend on the image."""
        expected, other = (
            outputs(self._reference, image, self._host, training=training) for image in (self._image, 1.0 - self._image)
        )
        try:
            found = outputs(candidate, self._image, self._host, training=training)
        except Exception as error:
            raise _slim_fails(error) from error
        return max_abs_error(expected, found), max_abs_error(expected, other)

    def _counted_macs(self, candidate: nn.Module) -> tuple[int, int]:
        """Return a side in pixels and the MACs at it.

        It is another side than the traced one, which also proves how the cost scales, unless the dense model runs at
        the traced one alone, as one with a table of positions does.
        """
        deployed, side = self._deployed(candidate), self._graph.cost.imgsz_px
        image = torch.zeros(1, self._graph.image_channels, 2 * side, 2 * side)
        try:
            return 2 * side, counted_macs(deployed, image)
        except Exception as error:
            if self._runs_on(image.double()):
                raise _slim_fails(error) from error
        try:
            return side, counted_macs(deployed, torch.zeros(1, self._graph.image_channels, side, side))
        except Exception as error:
            raise _slim_fails(error) from error

    def _runs_on(self, image: Tensor) -> bool:
        """Return whether the dense model takes such an image."""
        try:
            forward_unchanged(self._reference, image, training=False)
        except Exception:
            return False
        return True


def counted_macs(model: nn.Module, image: Tensor) -> int:
    """Count the multiply-adds of one inference while it runs; see `channels.counting`."""
    counter = CallCounter()
    forward_unchanged(model, image, training=False, modes=(counter,))
    return sum(counter.macs)


def outputs(model: nn.Module, image: Tensor, host: Host, *, training: bool) -> list[Tensor]:
    """Return the tensors that really leave a model, in the structure of training or of inference."""
    return output_tensors(host.outputs(forward_unchanged(model, image, training=training)))


def enliven(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Give norms random scales and shifts and, one forward long, measure their statistics anew, in place."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    training, momenta = [module.training for module in model.modules()], [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the average over all images: those of this forward, after the reset
        norm.reset_running_stats()
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(norm.bias, 0.0, 0.5, generator=generator)
    with torch.no_grad(), same_random_numbers():
        model.train()(images)
    for module, was in zip(model.modules(), training, strict=True):
        module.training = was
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _slim_fails(error: Exception) -> VerificationError:
    return VerificationError(
        f"the slim model does not run: {error}",
        expected="a forward that follows its weights' sizes",
        remedy="nothing was saved; a block with sizes hidden in Python needs a row in the host's block table",
    )


def max_abs_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference between outputs.

    Raises:
        VerificationError: There are none, or their number or shapes differ.
    """
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, found)]
    if shapes[0] != shapes[1] or not expected:
        raise VerificationError(f"outputs of shapes {shapes[1]}", expected=f"{shapes[0]}, as the dense model gives")
    # Masks and indices are numbers too, and what is empty in both cannot differ.
    pairs = [(one.double(), other.double()) for one, other in zip(expected, found, strict=True) if one.numel()]
    return max((float((one - other).abs().max()) for one, other in pairs), default=0.0)
