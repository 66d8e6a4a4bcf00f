"""What a manifest has to look like: it has no checksum of its own, and is read before anything else."""

from __future__ import annotations

from typing import Any, Mapping

_DETECTION = {"class": int, "score": float, "box": [float]}

_SHAPE: Mapping[str, Any] = {
    "format": int,
    "target": str,
    "network": {
        "name": str,
        "task": str,
        "imgsz_px": int,
        "classes": [str],
        "end_to_end": bool,
        "extras": {str: [int]},
    },
    "artefacts": [{"path": str, "backend": str, "precision": str, "max_rel": float}],
    "engine": (str, type(None)),
    "calibration": [str],
    "tolerances": {str: (float, type(None))},
    "reference": {
        "images": [str],
        "outputs": str,
        "confidence": float,
        "iou": float,
        "detections": [[_DETECTION]],
    },
    "provenance": {},
    "files": {str: str},
}
"""Types of values; a list of one shape, a mapping of named shapes, or of any names to one; alternatives in a tuple."""


def require_manifest(value: Any) -> None:
    """Refuse what cannot be the manifest of a bundle.

    Args:
        value: As JSON gave it.

    Raises:
        ValueError: A value is missing, or is not what it has to be; it is named.
    """
    _require(value, _SHAPE, "")
    network, reference = value["network"], value["reference"]
    paths = [artefact["path"] for artefact in value["artefacts"]]
    boxes = [one["box"] for found in reference["detections"] for one in found]
    for right, words in (
        (network["imgsz_px"] > 0, "imgsz_px is not positive"),
        (network["classes"], "there are no classes"),
        (paths, "there are no artefacts"),
        (reference["images"], "there are no reference images"),
        (len(reference["images"]) == len(reference["detections"]), "reference images and detections differ in number"),
        (all(len(box) == 4 for box in boxes), "a box does not have four sides"),
        (
            value["engine"] is None or any(path.endswith(".onnx") for path in paths),
            "there is no .onnx file to build the engine from",
        ),
    ):
        if not right:
            raise ValueError(words)
    for part in (*paths, *reference["images"], reference["outputs"], *value["calibration"]):
        if not any(is_of(name, part) for name in value["files"]):
            raise ValueError(f"'{part}' has no checksum")


def is_of(name: str, part: str) -> bool:
    """Tell whether a file is a part of the bundle, or inside of it."""
    return name == part or name.startswith(f"{part}/")


def _require(value: Any, shape: Any, name: str) -> None:
    """Hold a value against a shape."""
    if isinstance(shape, list):
        _require_type(value, (list,), name)
        for index, item in enumerate(value):
            _require(item, shape[0], f"{name}.{index}")
    elif isinstance(shape, Mapping):
        _require_type(value, (dict,), name)
        for key, inner in shape.items():
            for found in value if key is str else [key]:
                if found not in value:
                    raise ValueError(f"'{name}' has no '{found}'" if name else f"there is no '{found}'")
                _require(value[found], inner, f"{name}.{found}".lstrip("."))
    else:
        _require_type(value, shape if isinstance(shape, tuple) else (shape,), name)


def _require_type(value: Any, kinds: tuple[type, ...], name: str) -> None:
    """Refuse a value of none of the types; JSON's whole numbers are numbers, its truths are none."""
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        words = " or ".join(_WORDS[kind] for kind in kinds)
        raise ValueError(f"{f'{name!r}' if name else 'it'} is {value!r:.60}, not {words}")


_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
