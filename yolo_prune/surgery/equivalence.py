"""Proof that a rewritten network computes what it did before.

Rewriting is a function of a network, so it is shown on two sets of weights, in fp64: on the network's own, and on
lively ones (see `surgery.verify`), for a barely trained network would agree with anything. The rewritten network that
is kept holds, bit for bit, the fp64 result on the own weights, rounded once to its type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolo_prune.channels import Host
from yolo_prune.channels.tensors import named_tensors
from yolo_prune.errors import VerificationError
from yolo_prune.surgery.copying import copied
from yolo_prune.surgery.verify import (
    RELATIVE_TOLERANCE,
    TOLERANCE,
    WEAKEST_RESPONSE,
    enliven,
    max_abs_error,
    outputs,
)


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """What the proof found.

    Attributes:
        max_abs_error: max |original - rewritten| over all outputs on lively weights, in training and inference
            structure, fp64.
        response: max |outputs of one image - outputs of another| on lively weights: how much there was to prove.
        own_max_abs_error: The error on the network's own weights, fp64.
        own_response: The response on them.
        rounded_max_abs_error: The error on the network's own weights in their own type: what rounding does.
    """

    max_abs_error: float
    response: float
    own_max_abs_error: float
    own_response: float
    rounded_max_abs_error: float

    def require(self) -> Equivalence:
        """Return self, or raise `VerificationError` if the networks differ."""
        if not self.response >= WEAKEST_RESPONSE:
            raise VerificationError(
                f"the outputs hardly depend on the image (they change by {self.response:.1e})",
                expected=f"at least {WEAKEST_RESPONSE:g}: with weights as weak as these, agreement proves nothing",
                remedy="train the model before it is rewritten; nothing was saved",
            )
        # Terms are added in another order than before, so rounding grows with the outputs, which are large in places:
        # those of lively YOLOv9 change by 7e4. Small ones are held to a fraction of their response as well.
        lively = min(TOLERANCE * max(1.0, self.response), RELATIVE_TOLERANCE * self.response)
        _require_at_most(lively, self.max_abs_error, "lively")
        _require_at_most(TOLERANCE * max(1.0, self.own_response), self.own_max_abs_error, "its own")
        return self


def _require_at_most(allowed: float, error: float, weights: str) -> None:
    if not error <= allowed:  # also catches NaN
        raise VerificationError(
            f"max |original - rewritten| = {error:.3e} on {weights} weights",
            expected=f"at most {allowed:.1e} in fp64: rewriting shall change nothing",
            remedy="nothing was saved; please report the model's yaml",
        )


def prove_equivalence(
    original: nn.Module,
    rewritten: nn.Module,
    rewrite: Callable[[nn.Module], nn.Module],
    *,
    host: Host,
    side_px: int,
    seed: int = 0,
) -> Equivalence:
    """Compare a network with its rewritten form; both are left as they are.

    Args:
        original: The network.
        rewritten: What `rewrite` made of it.
        rewrite: Returns the rewritten form of a network of that structure, and leaves its argument as it is.
        host: Picks the outputs that are compared.
        side_px: Side of the random images.
        seed: Their seed.

    Raises:
        VerificationError: `rewritten` is not what `rewrite` gives in fp64, it does not run, or its outputs differ in
            number or shape.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, image_channels(original), side_px, side_px, generator=generator, dtype=torch.float64)
    images = (image, 1.0 - image)
    own = copied(original).double()
    own_rewritten = rewrite(own)
    _require_rounded(own_rewritten, rewritten)
    own_error, own_response = _compare(own, own_rewritten, images, host)
    dtype = next(original.parameters()).dtype
    rounded_error, _ = _compare(original, rewritten, (images[0].to(dtype), images[1].to(dtype)), host)
    enliven(own, torch.cat(images), generator)
    error, response = _compare(own, rewrite(own), images, host)
    return Equivalence(
        max_abs_error=error,
        response=response,
        own_max_abs_error=own_error,
        own_response=own_response,
        rounded_max_abs_error=rounded_error,
    )


def _require_rounded(exact: nn.Module, rewritten: nn.Module) -> None:
    """Raise unless each tensor of the rewritten network is the exact one, rounded to its type."""
    expected, found = named_tensors(exact), named_tensors(rewritten)
    for name in sorted(expected.keys() | found.keys()):
        alike = name in expected and name in found
        if not alike or not torch.equal(expected[name].to(found[name].dtype), found[name]):
            raise VerificationError(f"'{name}' is not what rewriting gives in fp64", expected="the same, rounded once")


def _compare(
    original: nn.Module, rewritten: nn.Module, images: tuple[Tensor, Tensor], host: Host
) -> tuple[float, float]:
    """Return how far the rewritten outputs are off, and how much the original's depend on the image."""
    errors, responses = [], []
    for training in (False, True):
        expected, other = (outputs(original, image, host, training=training) for image in images)
        try:
            found = outputs(rewritten, images[0], host, training=training)
        except Exception as error:
            raise VerificationError(
                f"the rewritten network does not run: {error}", expected="a forward", remedy="nothing was saved"
            ) from error
        errors.append(max_abs_error(expected, found))
        responses.append(max_abs_error(expected, other))
    return max(errors), min(responses)


def image_channels(model: nn.Module) -> int:
    """Return the input channels of the first convolution: hosts register their layers in the order of the forward."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return first.in_channels
