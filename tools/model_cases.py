"""The case table of models: every yaml of the host and of configs/models, at every scale. A new yaml is a new row."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from ultralytics.nn.tasks import YOLOEModel

from yolo_prune.hosts.ultralytics.checkpoints import build_from_yaml

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / "configs" / "models"
NEEDS_DOWNLOAD = ("yolo11-cls-resnet18",)
"""Yamls that fetch pretrained weights when they are built; `configs/models` has the same backbone without."""

OTHER_TASKS = ("-depth", "-sem")
"""Ends of the names of yamls for tasks that are none of ours."""

SCALES = "ntsmbclex"
"""Scales from small to large; a yaml with one scale comes first."""

EXTRA = ("-cls", "yoloe", "world", "rtdetr")
"""Families that come last among their scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model.

    Attributes:
        name: What the host builds it from, without suffix: yaml and scale, such as `yolov8n-seg`.
        family: Name of the yaml without the scale, such as `yolov8-seg`.
        scale: Letter of the scale; empty where the yaml has one only.
        yaml: The file.
    """

    name: str
    family: str
    scale: str
    yaml: Path

    @property
    def source(self) -> str:
        """What the host builds it from: a name that it knows (with the scale in it), or a file of ours."""
        return str(self.yaml) if self.yaml.is_relative_to(OWN) else f"{self.name}.yaml"


def all_cases() -> list[Case]:
    """Return every case, small scales first."""
    import ultralytics

    folder = Path(ultralytics.__file__).parent / "cfg" / "models"
    files = [*sorted(folder.rglob("*.yaml")), *sorted(OWN.glob("*.yaml"))]
    ours = [file for file in files if file.stem not in NEEDS_DOWNLOAD and not file.stem.endswith(OTHER_TASKS)]
    cases = [case for file in ours for case in _scales(file)]
    return sorted(cases, key=lambda case: (SCALES.find(case.scale), any(word in case.family for word in EXTRA)))


def _scales(file: Path) -> Iterator[Case]:
    """Yield a case for every scale of a yaml; a family with a yaml per scale (v9, v10) has one each."""
    letter = re.fullmatch(r"(yolov(?:9|10))([a-z])(.*)", file.stem)
    if letter:
        yield Case(name=file.stem, family=letter[1] + letter[3], scale=letter[2], yaml=file)
        return
    scales = yaml.safe_load(file.read_text(encoding="utf-8")).get("scales") or {}
    if len(scales) < 2:
        yield Case(name=file.stem, family=file.stem, scale="", yaml=file)
        return
    version = re.match(r"(yoloe-v?|yolov?)\d+", file.stem)
    head = version[0] if version else file.stem
    for scale in scales:
        yield Case(name=head + scale + file.stem[len(head) :], family=file.stem, scale=scale, yaml=file)


def build_lively(source: str, *, seed: int = 0) -> Any:
    """Build a model with random weights whose every channel carries signal and whose outputs are far from constant.

    Freshly built models fade out with depth, so an error deep inside would not reach the output.
    """
    torch.manual_seed(seed)
    model: Any = build_from_yaml(source)
    if isinstance(model, YOLOEModel):
        prompt(model)
    enliven(model)
    return model.eval()


def prompt(model: Any) -> None:
    """Give a model of open vocabulary embeddings of its classes, shape (1, classes, features).

    Without any, all classes look alike and nothing before them matters; so it is under a bias that closes every score.
    """
    head = model.model[-1]
    model.pe = nn.functional.normalize(torch.randn(1, head.nc, head.embed), dim=-1)
    for name, parameter in head.named_parameters():
        if re.fullmatch(r"(one2one_)?cv4\.\d+\.bias", name):
            nn.init.zeros_(parameter)


def enliven(model: Any) -> None:
    """Give norms random scales and shifts and, one forward long, measure their statistics anew, in place.

    Four cells a side are left of the image on the coarsest map: with fewer, the statistics of so few values do not hold
    for another image, activations grow from norm to norm, and scores close to exactly 0 and 1.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.5)
        norm.momentum = None
    model.train()
    with torch.no_grad():
        side = 160 if hasattr(model.model[-1], "num_queries") else 4 * max(32, int(model.stride.max()))
        model(torch.rand(2, 3, side, side))
    for norm in norms:
        norm.momentum = 0.03
        norm.num_batches_tracked = torch.tensor(0)
