"""Check, build, benchmark and detect with what lies beside this file: python3 run.py --help."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.dont_write_bytecode = True  # the folder may be read-only, and holds no file that its manifest does not list
sys.path.insert(0, str(HERE))

try:
    from yolo_prune.device.runner import main
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("cv2", "numpy"):
        raise
    print(
        f"error: package '{error.name}' is not installed\n"
        f"  to do:    python3 -m pip install -r '{next(HERE.glob('requirements-*.txt'))}'",
        file=sys.stderr,
    )
    sys.exit(2)
except ImportError as error:  # it is there, and a library of the system that it needs is not
    if (error.name or "").partition(".")[0] not in ("cv2", "numpy"):
        raise
    print(
        f"error: package '{error.name}' does not start: {error}\n"
        "  to do:    install the library that it names; for libGL: python3 -m pip install opencv-python-headless",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main(HERE, sys.argv[1:]))
