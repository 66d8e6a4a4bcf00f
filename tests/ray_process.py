"""Work on a Ray cluster that lives as long as this process: python ray_process.py FOLDER DEATHS NUMBERS.

Squares numbers, in two rounds. The worker that takes task 3 dies of it, DEATHS times. Prints the results as JSON, or
the error.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from yolo_prune.errors import ConfigError, YoloPruneError
from yolo_prune.search.workers import on_ray

FOUND = "found:"
"""Begins the line that counts: Ray prints some of its own."""


@dataclass
class Squares:
    """Makes the work; each death leaves a file."""

    folder: Path
    deaths: int

    def __call__(self) -> Callable[[int], int]:
        if self.deaths < 0:
            raise ConfigError("less than no deaths", expected="a number of them")
        return self.square

    def square(self, number: int) -> int:
        files = list(self.folder.iterdir())
        if number == 3 and len(files) < self.deaths:
            (self.folder / str(len(files))).touch()
            os._exit(1)
        if number == 100:
            raise ConfigError("a hundred", expected="less")
        return number**2


if __name__ == "__main__":
    folder, deaths, numbers = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    try:
        with on_ray(Squares(folder, deaths), address="local") as crew:
            first = dict(crew.work_off({number: number for number in numbers[:2]}))
            print(FOUND, json.dumps(first | dict(crew.work_off({number: number for number in numbers[2:]}))))
    except YoloPruneError as error:
        print(FOUND, type(error).__name__, error.found, error.exit_code)
