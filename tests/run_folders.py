"""Run folders as `run` leaves them, without a run: records that are written down here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yolo_prune.hosts.ultralytics.records import FILES

HOSTILE = "<script>alert('x')</script> & \"$\\alpha$\" äöü.jpg"
"""A name that would run, break an attribute, or be set as mathematics."""

SETTINGS: dict[str, Any] = {
    "model": "yolov8n.pt", "data": "shapes/data.yaml", "imgsz": 320, "seed": 0, "train": {"epochs": 30},
    "rewrite": {}, "prune": {"target_macs": 0.5}, "finetune": {"epochs": 20}, "control": True, "direct": None,
    "smaller": None, "splits": ["val", "test"], "formats": ["onnx"], "runs": 100, "threads": 2,
    "files_sha256": {"yolov8n.pt": "ab" * 32, "shapes/data.yaml": "cd" * 32},
}  # fmt: skip

COSTS = {
    "dense": {"macs": 1080062400, "params": 3138489},
    "slim": {"macs": 537899200, "params": 1877305},
    "control": {"macs": 537899200, "params": 1877305},
}

WIDTHS = {
    "dense": {"model.0.conv": 16, "model.1.conv": 32, "model.2.cv1.conv": 32, "model.2.m.0.cv1.conv": 16},
    "slim": {"model.0.conv": 8, "model.1.conv": 24, "model.2.cv1.conv": 32},
}

MACHINE = {"cpu": "Some Processor", "cores": 2, "python": "3.11.7", "runtimes": {"onnxruntime": "1.31.1"}}


def evaluation(split: str, value: float) -> dict[str, Any]:
    figures = {"map50": value + 0.2, "map50_95": value, "precision": 0.7, "recall": 0.8}
    return {"split": split, "images": 8, "imgsz_px": 320, **figures}


def latency(median: float) -> dict[str, float]:
    factors = {"median": 1.0, "p5": 0.81, "p25": 0.93, "p75": 1.07, "p95": 1.21, "min": 0.77}
    return {f"{name}_ms": median * factor for name, factor in factors.items()}


def speed_up(ratio: float, *, faster: bool) -> dict[str, Any]:
    return {
        "name": "slim",
        "baseline": "dense",
        "ratio": ratio,
        "p25": ratio * 0.9,
        "p75": ratio * 1.1,
        "faster": faster,
    }


EVALUATIONS = {
    name: {split: evaluation(split, value - lost) for split, lost in (("val", 0.0), ("test", 0.0173))}
    for name, value in (("dense", 0.61558), ("slim", 0.49747), ("control", 0.35303))
}

SUMMARY: dict[str, Any] = {
    "settings": SETTINGS, "costs": COSTS, "evaluations": EVALUATIONS,
    "verification": {"max_abs_error": 1.0658e-14, "macs_predicted": 21515968, "macs_counted": 21515968},
    "parity": {"slim_onnx": {"artefact": "slim.onnx", "backend": "onnxruntime", "precision": "fp32", "tolerance": 0.001,
                             "max_rel": 1.243e-05, "passed": True}},
    "latency_ms": {"dense_pytorch": latency(46.714), "slim_pytorch": latency(45.1), "dense_onnx": latency(21.378),
                   "slim_onnx": latency(13.139)},
    "speed_up": {"pytorch": speed_up(1.0312, faster=False), "onnx": speed_up(1.6268, faster=True)},
    "machine": MACHINE, "version": "0.1.0",
}  # fmt: skip

SPARSITY = {
    "options": {}, "silent_below": 0.05, "largest": 3.0,
    "epochs": [
        {"epoch": epoch, "strength": 0.0123 * epoch, "silent": 0.11 * epoch, "macs": 1.0 - 0.17 * epoch,
         "distance": 0.5, "nominal": 0.1, "arrived": 1.0, "pull": 0.2, "histogram": [epoch * 9, 20, 5, 1]}
        for epoch in range(4)
    ],
}  # fmt: skip

BY_METHOD: dict[str, dict[str, Any]] = {
    "pruning": {
        "options": {"criterion": "taylor", "allocation": "uniform"}, "macs": 1000.0, "imgsz_px": 320,
        "steps": [{"step": 1, "epoch": 2, "after": {"macs": 813, "params": 29_000}},
                  {"step": 2, "epoch": 4, "after": {"macs": 487, "params": 17_000}}],
    },
    "resrep": {
        "options": {"target": 0.6}, "strength": 0.00123, "momentum": 0.99, "reachable": 0.3,
        "epochs": [{"epoch": 1, "masked": 0.0, "macs": 1.0}, {"epoch": 2, "masked": 0.21, "macs": 0.7123},
                   {"epoch": 3, "masked": 0.345, "macs": 0.5991}],
        "converted": {"macs": 0.5991, "difference": 3.21e-13, "max_abs_error": 2e-14},
    },
    "stripes": {
        "options": {"target": 0.6, "threshold": 0.01}, "macs": 1000.0, "stripes": 45_000, "strength": 0.000321,
        "epochs": [{"epoch": 1, "dead": 9_000, "kept_macs": 0.8123}, {"epoch": 2, "dead": 21_000, "kept_macs": 0.5987}],
    },
    "grafting": {
        "options": {"mode": "external"}, "best": "net2", "fitness": {"net1": 0.4321, "net2": 0.5432},
        "nets": {"net1": {"seed": 0, "lr_factor": 0.5}, "net2": {"seed": 1, "lr_factor": 1.0}},
        "epochs": [{"epoch": 1, "grafted": {"net1": 0.412, "net2": 0.588}},
                   {"epoch": 2, "grafted": {"net1": None, "net2": None}}],
    },
    "unstructured": {
        "options": {"pattern": "2:4", "amount": 0.5}, "checkpoint": "best.pt",
        "layers": {"a": {"zeros": 50, "weights": 100}, "b": {"zeros": 151, "weights": 300}},
        "network": {"zeros": 201, "weights": 1000},
    },
}  # fmt: skip
"""Records of methods of training, by their names, with what a report reads of them."""

CANDIDATES = [
    {"number": number, "macs": 530_000_000 + 1_003_000 * number, "params": 1_800_000 + number, "score": score,
     "widths": [8, 16]}
    for number, score in enumerate((0.1234, 0.2345, 0.1999, 0.3111))
]  # fmt: skip

PREDICTED = {
    "measured_on": "ncnn, 320 px, 2 threads", "cpu": "a processor",
    "fractions": [[candidate["number"], 0.5 + 0.01 * candidate["number"]] for candidate in CANDIDATES],
}  # fmt: skip

TUNED = [
    {"recalibrated": 0.11, "as_pruned": 0.02, "fine_tuned": 0.41},
    {"recalibrated": 0.22, "as_pruned": 0.01, "fine_tuned": 0.44},
    {"recalibrated": 0.33, "as_pruned": 0.03, "fine_tuned": 0.47},
]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_picture(path: Path, *, side_px: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (side_px, side_px, 3), dtype=np.uint8)
    path.write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def detections(image: str = "a.jpg") -> dict[str, Any]:
    models = {
        name: {"file": f"detections/0_{name}.jpg", "objects": objects}
        for name, objects in (("dense", 19), ("slim", 13))
    }
    return {"split": "test", "confidence": 0.25, "images": [{"image": image, "models": models}]}


def run_folder(folder: Path, **settings: Any) -> Path:
    """Write a finished run with everything that a report shows, but for a search; return its folder."""
    write(folder / "run.json", {**SETTINGS, **settings})
    write(folder / "summary.json", SUMMARY)
    write(folder / "stages" / "widths.json", WIDTHS)
    write(folder / "stages" / "detections.json", detections())
    for name in ("dense", "slim"):
        write_picture(folder / "detections" / f"0_{name}.jpg")
    write(folder / "dense" / "sparsity.json", SPARSITY)
    return folder


def whole_run(folder: Path) -> tuple[Path, list[str]]:
    """Write a run with everything; return its folder and the further words that `report` needs."""
    write_lines(folder / "search" / "candidates.jsonl", CANDIDATES)
    write(folder / "search" / "latencies.json", PREDICTED)
    tuned = write_lines(folder / "tuned.jsonl", TUNED)
    for method, record in BY_METHOD.items():
        write(folder / "slim" / FILES[method][0], record)
    return run_folder(folder), [f"search={folder / 'search'}", f"correlation={tuned}"]
