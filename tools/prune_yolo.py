"""Prune a YOLO checkpoint, in the style of YOLOv5's scripts.

python tools/prune_yolo.py --weights best.pt --target-macs 0.5 --criterion bn_scale --round-to 8 --out slim.pt
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from yolo_prune.cli import execute, report
from yolo_prune.configuration import describe, parse
from yolo_prune.errors import YoloPruneError
from yolo_prune.pipeline.prune import PruneConfig, prune

FLAGS = {"model": "--weights"}
"""Flags that are not called like their setting."""


def parse_opt() -> argparse.Namespace:
    """Read the flags: every setting of `yolo-prune prune`, with dashes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default, text in describe(PruneConfig):
        flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
        kind = {"action": "store_true"} if default == "false" else {"required": default == "required"}
        note = default if default == "required" else f"default: {default}"
        parser.add_argument(flag, dest=name, default=None, help=f"{text} ({note})", **kind)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main() -> int:
    """Prune; returns the exit code."""
    opt = parse_opt()
    names = [field.name for field in dataclasses.fields(PruneConfig)]
    words = [f"{name}={getattr(opt, name)}" for name in names if getattr(opt, name) is not None]
    try:
        print(execute(prune, parse(PruneConfig, words)[0]), end="")
    except YoloPruneError as error:
        return report(error, debug=opt.debug)
    return 0


if __name__ == "__main__":
    sys.exit(main())
