"""Run in a process of its own, where yolo_prune cannot be imported: what stock Ultralytics makes of a slim checkpoint.

python stock_process.py CHECKPOINT IMAGE.pth FOLDER [export]: writes FOLDER/raw.pth, FOLDER/boxes.pth and, if asked to,
beside the checkpoint the ONNX file that the host exports.
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from fresh_process import Blocked


def main(checkpoint: str, image_file: str, folder: Path, *, export: bool) -> None:
    sys.meta_path.insert(0, Blocked())
    with contextlib.suppress(ModuleNotFoundError):  # what has to happen
        import yolo_prune  # noqa: F401

        sys.exit("yolo_prune can be imported: the test proves nothing")
    import torch
    from ultralytics import YOLO

    torch.set_num_threads(1)
    image = torch.load(image_file)
    yolo = YOLO(checkpoint)
    with torch.no_grad():
        raw = yolo.model.eval()(image)
    torch.save(raw, folder / "raw.pth")
    best = float(raw[0][:, 4:].max())  # random weights score low: a threshold that something passes, whatever was cut
    pixels = (image[0].flip(0).permute(1, 2, 0) * 255).byte().numpy()  # the host takes BGR
    torch.save(
        yolo.predict(pixels, imgsz=image.shape[-1], conf=best / 2, verbose=False)[0].boxes.data, folder / "boxes.pth"
    )
    if export:
        YOLO(checkpoint).export(format="onnx", imgsz=image.shape[-1])
    assert not [name for name in sys.modules if name.startswith("yolo_prune")]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), export="export" in sys.argv[4:])
