"""What channel groups cost, measured one at a time: a file between `sensitivity` and `prune`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolo_prune.allocation.paths import DropCurve
from yolo_prune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sensitivities:
    """Losses of the recalibrated mAP50-95 on held-out training images.

    Attributes:
        source_sha256: Hash of the checkpoint.
        criterion: By which the channels were chosen that went.
        dense: Score of the dense model, recalibrated alike.
        drops: By group name.
    """

    source_sha256: str
    criterion: str
    dense: float
    drops: Mapping[str, DropCurve]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> Sensitivities:
        """Undo `to_json`, from a file.

        Raises:
            ConfigError: It cannot be read.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            drops = {
                str(name): DropCurve(removed=tuple(curve["removed"]), drops=tuple(curve["drops"]))
                for name, curve in content["drops"].items()
            }
            return cls(
                source_sha256=str(content["source_sha256"]),
                criterion=str(content["criterion"]),
                dense=float(content["dense"]),
                drops=drops,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise ConfigError(
                f"cannot read '{path}': {error!r}", expected="the file that `yolo-prune sensitivity` wrote"
            ) from error

    def require(self, *, source_sha256: str, criterion: str) -> None:
        """Refuse to serve another checkpoint or criterion than those that were measured.

        Raises:
            ConfigError: It is another one.
        """
        if self.source_sha256 != source_sha256:
            raise ConfigError(
                f"the sensitivity was measured on another checkpoint ({self.source_sha256[:8]}, not "
                f"{source_sha256[:8]})",
                expected="that of this one",
                remedy="yolo-prune sensitivity model=... measures it",
            )
        if self.criterion != criterion:
            raise ConfigError(
                f"criterion={criterion}, but the sensitivity was measured with {self.criterion}",
                expected="the criterion by which the channels went that were measured",
                remedy=f"criterion={self.criterion}",
            )
