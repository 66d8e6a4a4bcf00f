"""Parameters and MACs as a closed form of the kept widths.

One MAC is one multiply-add. A convolution costs `coef * kept_out * kept_in`, a parameter holds `coef * product of its
kept dimensions` numbers; so a candidate is priced by one small matrix product, without running a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class CostTerm:
    """`coef` times the kept sizes of up to two axes.

    Attributes:
        coef: MACs (or parameters) per pair of entries at the traced image size.
        axes: Indices of the axes whose kept sizes multiply `coef`.
        area_power: How the term grows with the image area: 1 for convolutions, 2 for attention products between
            positions, 1/2 for what runs along a side, 0 for what does not see the image (parameters, layers after
            global pooling).
    """

    coef: int
    axes: tuple[int, ...]
    area_power: float = 0


@dataclass(frozen=True)
class _Form:
    """Terms as arrays; axis -1 stands for the constant 1."""

    coef: npt.NDArray[np.float64]
    power: npt.NDArray[np.float64]
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]

    @classmethod
    def of(cls, terms: Sequence[CostTerm]) -> _Form:
        padded = [(*term.axes, -1, -1)[:2] for term in terms]
        return cls(
            coef=np.array([term.coef for term in terms], dtype=np.float64),
            power=np.array([term.area_power for term in terms], dtype=np.float64),
            first=np.array([axes[0] for axes in padded], dtype=np.int64),
            second=np.array([axes[1] for axes in padded], dtype=np.int64),
        )

    def price(self, sizes: npt.NDArray[np.float64], area_ratio: float) -> npt.NDArray[np.float64]:
        """Price a batch of axis sizes, shape (..., axes + 1), whose last entry is the constant 1."""
        scaled = self.coef * area_ratio**self.power
        return (sizes[..., self.first] * sizes[..., self.second]) @ scaled


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Prices kept widths.

    Attributes:
        incidence: float array of shape (axes, groups): how many entries of an axis one channel of a group takes.
        macs_terms: Terms of the deployed network's MACs, batch 1.
        params_terms: Terms of the checkpoint's trainable parameters.
        imgsz_px: Side of the square image that was traced.
    """

    incidence: npt.NDArray[np.float64]
    macs_terms: tuple[CostTerm, ...]
    params_terms: tuple[CostTerm, ...]
    imgsz_px: int

    @cached_property
    def _macs(self) -> _Form:
        return _Form.of(self.macs_terms)

    @cached_property
    def _params(self) -> _Form:
        return _Form.of(self.params_terms)

    def macs(self, kept: npt.ArrayLike, *, imgsz_px: int | None = None) -> npt.NDArray[np.float64]:
        """Return the MACs at kept group widths.

        Args:
            kept: Kept channels per group, shape (groups,) or (candidates, groups).
            imgsz_px: Side of the square image; a multiple of the model's stride. Default: the traced one. Other sizes
                are exact for networks whose planes scale with the image, as all detectors of our hosts do.

        Returns:
            Shape () or (candidates,); whole numbers, exact below 2**53.
        """
        area_ratio = 1.0 if imgsz_px is None else (imgsz_px / self.imgsz_px) ** 2
        return self._macs.price(self._sizes(kept), area_ratio)

    def params(self, kept: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the number of parameters at kept group widths; shapes as in `macs`."""
        return self._params.price(self._sizes(kept), 1.0)

    def _sizes(self, kept: npt.ArrayLike) -> npt.NDArray[np.float64]:
        sizes = np.asarray(kept, dtype=np.float64) @ self.incidence.T
        return np.concatenate([sizes, np.ones((*sizes.shape[:-1], 1))], axis=-1)


def params_terms(shapes: Mapping[str, tuple[int, ...]], axis_index: Mapping[tuple[str, int], int]) -> list[CostTerm]:
    """Return one term per parameter.

    Args:
        shapes: Shape of each trainable parameter by its name.
        axis_index: Index of each axis that carries channels.
    """
    terms = []
    for name, shape in shapes.items():
        tracked = [dim for dim in range(len(shape)) if (name, dim) in axis_index]
        fixed = [size for dim, size in enumerate(shape) if dim not in tracked]
        axes = tuple(axis_index[name, dim] for dim in tracked)
        terms.append(CostTerm(coef=int(np.prod(fixed, dtype=np.int64)), axes=axes))
    return terms
