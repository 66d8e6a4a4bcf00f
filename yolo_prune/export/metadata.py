"""What an artefact says about itself: the host's metadata, read and added to in place.

ONNX files hold strings in `metadata_props`, folders of NCNN and OpenVINO a `metadata.yaml`, engines a JSON object
before their plan; an entry of ours is a JSON string in each, which the host passes over.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from yolo_prune.device.runtimes.base import import_runtime, unreadable
from yolo_prune.device.runtimes.engine_file import EngineFile
from yolo_prune.files import new_file

ENGINE = ".engine"
"""How the file of an engine ends."""


def read_metadata(artefact: Path) -> dict[str, Any]:
    """Return the metadata of an artefact; an `.onnx` file's are strings.

    Raises:
        ConfigError: It is missing, damaged, or has none.
        MissingDependencyError: `onnx` is not installed.
    """
    try:
        if artefact.is_dir():
            found = yaml.safe_load((artefact / "metadata.yaml").read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("metadata.yaml holds no mapping")
            return found
        if artefact.suffix == ENGINE:
            return dict(EngineFile.read(artefact).metadata)
        return {entry.key: entry.value for entry in _load(artefact).metadata_props}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise unreadable(artefact, error) from error


def write_metadata(
    artefact: Path, entries: Mapping[str, Any] | None = None, *, arguments: Mapping[str, Any] | None = None
) -> None:
    """Add entries to the metadata of an artefact, in one step.

    Args:
        artefact: What the host exported.
        entries: By key; what stands there is replaced. Values are written as JSON strings.
        arguments: Changes of the host's `args`, of which runtimes read the precision.

    Raises:
        ConfigError: The artefact is damaged.
        OutputError: It cannot be written.
    """
    found = read_metadata(artefact)
    added: dict[str, Any] = {key: json.dumps(value) for key, value in (entries or {}).items()}
    if arguments:
        known = found.get("args", {})
        known = ast.literal_eval(known) if isinstance(known, str) else known
        added["args"] = {**known, **arguments}
    if artefact.is_dir():
        with new_file(artefact / "metadata.yaml", replace=True) as temporary:
            temporary.write_text(yaml.safe_dump({**found, **added}, sort_keys=False, allow_unicode=True), "utf-8")
        return
    if artefact.suffix == ENGINE:
        EngineFile(EngineFile.read(artefact).plan, {**found, **added}).write(artefact, replace=True)
        return
    onnx, model = import_runtime("onnx", purpose="write what an ONNX file says about itself"), _load(artefact)
    onnx.helper.set_model_props(model, {**found, **{key: str(value) for key, value in added.items()}})
    with new_file(artefact, replace=True) as temporary:
        onnx.save(model, temporary)


def _load(artefact: Path) -> Any:
    """Read an ONNX file.

    Raises:
        OSError: It is not there.
        ValueError: It is damaged.
    """
    onnx = import_runtime("onnx", purpose="read what an ONNX file says about itself")
    try:
        return onnx.load(artefact)
    except OSError:
        raise
    except Exception as error:  # protobuf's errors have no common root
        raise ValueError(str(error)) from error
