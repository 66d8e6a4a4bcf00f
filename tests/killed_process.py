"""The command line in a process that dies: python killed_process.py EVENT TIMES WORD...

It is killed, as by `kill -9`, the TIMES-th time that the host's callbacks of EVENT run.
"""

import os
import signal
import sys

from ultralytics.utils.callbacks import default_callbacks

from yolo_prune.cli import main


def deadly(times: int):
    """Return a callback that kills the process at its TIMES-th call."""
    calls = []

    def callback(_: object) -> None:
        calls.append(None)
        if len(calls) == times:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    return callback


if __name__ == "__main__":
    default_callbacks[sys.argv[1]].append(deadly(int(sys.argv[2])))
    sys.exit(main(sys.argv[3:]))
