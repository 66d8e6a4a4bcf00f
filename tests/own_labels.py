"""A detector and data whose labels are what it finds: its slim versions score, and differently, without training."""

from __future__ import annotations

from pathlib import Path

from bundles import IMGSZ_PX, talkative
from checkpoint_files import save_as_host
from models import lively
from shapes import draw_dataset
from ultralytics import YOLO

from yolo_prune.hosts.ultralytics.evaluation import image_files


def detector_with_its_labels(folder: Path) -> tuple[Path, Path]:
    """Write both; return the checkpoint and the data yaml, whose training images alone have the labels."""
    data = draw_dataset(folder / "shapes", seed=0, train=16, val=8, test=8, imgsz_px=96)
    dense = save_as_host(lively("yolov8n"), folder / "dense.pt")
    checkpoint = talkative(dense, image_files(data, "train")[0], folder / "talkative.pt")
    detector = YOLO(str(checkpoint))
    for image in image_files(data, "train"):
        (found,) = detector.predict(str(image), imgsz=IMGSZ_PX, max_det=20, verbose=False, device="cpu")
        boxes = zip(found.boxes.cls.tolist(), found.boxes.xywhn.tolist(), strict=True)
        lines = (f"{kind:.0f} " + " ".join(f"{side:.6f}" for side in box) for kind, box in boxes)
        (folder / "shapes" / "labels" / "train" / f"{image.stem}.txt").write_text("\n".join(lines))
    return checkpoint, data
