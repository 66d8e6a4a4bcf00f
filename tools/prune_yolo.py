"""Prune a YOLO checkpoint, in the style of YOLOv5's scripts.

python tools/prune_yolo.py --weights best.pt --target-macs 0.5 --criterion bn_scale --round-to 8 --out slim.pt
"""

from __future__ import annotations

import argparse
import sys

from yolo_prune.cli import execute, report
from yolo_prune.errors import YoloPruneError
from yolo_prune.flags import add_flags, settings_of
from yolo_prune.pipeline.prune import prune
from yolo_prune.pipeline.prune_config import PruneConfig


def parse_opt() -> argparse.Namespace:
    """Read the flags: every setting of `yolo-prune prune`, with dashes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_flags(parser, PruneConfig, {"model": "--weights"})
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main() -> int:
    """Prune; returns the exit code."""
    opt = parse_opt()
    try:
        print(execute(prune, settings_of(PruneConfig, opt)), end="")
    except YoloPruneError as error:
        return report(error, debug=opt.debug)
    return 0


if __name__ == "__main__":
    sys.exit(main())
