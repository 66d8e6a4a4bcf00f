"""Train classic YOLOv5 by its own train.py, with sparsity and with slim checkpoints.

python tools/train_yolov5.py --repo yolov5 --weights yolov5s.pt --data data.yaml --epochs 100 --sparsity 0.001
python -m torch.distributed.run --nproc_per_node 2 tools/train_yolov5.py --repo yolov5 ...
"""

from __future__ import annotations

import sys

from yolo_prune.cli import main

if __name__ == "__main__":
    sys.exit(main(["yolov5", "train", *sys.argv[1:]]))
