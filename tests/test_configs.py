"""Every configuration that we ship is run once, on a drawn data set, small and short: its keys act as they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from checkpoint_files import save_as_host
from resrep_cases import small_network

from yolo_prune.configuration import describe
from yolo_prune.pipeline.train_config import TrainConfig
from yolo_prune.pipeline.training_methods import METHODS
from yolo_prune.report.methods import TOLD

CONFIGS = Path(__file__).parents[1] / "configs"

SHORT = {
    "bccd": "train.epochs=1 finetune.epochs=3 finetune.prune_every=1 finetune.prune_steps=2",
    "demo": "train.epochs=1 finetune.epochs=1",
    "gradual": "finetune.epochs=3 finetune.prune_every=1 finetune.prune_steps=2",
    "grafting": "train.epochs=2 finetune.epochs=3 finetune.prune_steps=2",
    "resrep": "finetune.epochs=10 finetune.batch=1 finetune.nbs=1",  # it wants many steps, and says so
    "shortcuts": "finetune.epochs=1",
    "slimming": "train.epochs=2 finetune.epochs=1",
    "stripes": "finetune.epochs=2",
    "unstructured": "finetune.epochs=1",
}
"""What makes each short, by its name."""

SMALL = "imgsz=64 formats=[onnx] runs=3 threads=1"
TRAINING = "workers=0 plots=false verbose=false device=cpu"

RECORDS = {
    "bccd": "slim/pruning.json", "gradual": "slim/pruning.json", "grafting": "dense/grafting.json",
    "resrep": "slim/resrep.json", "shortcuts": "rewritten.pt", "slimming": "dense/sparsity.json",
    "stripes": "slim/stripes.json", "unstructured": "slim/zeros.json",
}  # fmt: skip
"""What only its method leaves."""


def test_every_method_has_a_configuration_and_stands_in_the_help():
    written = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS.glob("*.yaml")]
    used = {part.get("method") for settings in written for part in (settings["train"], settings["finetune"])}
    (told,) = [text for key, _, text in describe(TrainConfig) if key == "method"]
    for name in [name for name, method in METHODS.items() if method.named]:
        assert name in used
        assert name in told


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_runs_to_its_end(command, path, tiny_data, tmp_path):
    settings, folder = yaml.safe_load(path.read_text(encoding="utf-8")), tmp_path / "run"
    model = save_as_host(small_network(), tmp_path / "dense.pt")
    words = [f"data={tiny_data}", f"out={folder}", f"model={model}", *SMALL.split(), *SHORT[path.stem].split()]
    words += [f"{part}.{word}" for part in ("train", "finetune") for word in TRAINING.split()]
    outcome = command("run", path, *words)
    assert outcome.code == 0, outcome.err
    costs = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["costs"]
    record = folder / RECORDS.get(path.stem, "pruned.pt")
    assert record.is_file()
    page = (folder / "report.html").read_text(encoding="utf-8")
    for told in [told for told in TOLD.values() if told.record == record.name]:
        assert f"{told.heading}, the {record.parent.name} model" in page
    parts = [settings.get("prune", {}), settings["finetune"]]
    (target,) = [part["target_macs"] for part in parts if "target_macs" in part]
    if path.stem == "stripes":  # its MACs are counted in stripes: an export stays dense
        last = json.loads((folder / "slim" / "stripes.json").read_text(encoding="utf-8"))["epochs"][-1]
        assert last["kept_macs"] <= target
    elif path.stem == "shortcuts":  # of the rewritten network
        grown = json.loads((folder / "stages" / "rewrite.json").read_text(encoding="utf-8"))["after"]
        assert costs["slim"]["macs"] <= target * grown["macs"]
    else:
        assert costs["slim"]["macs"] <= target * costs["dense"]["macs"]
