"""Work on a Ray cluster that lives as long as this process: python ray_process.py FOLDER.

Squares numbers. In each of four scenarios the worker that takes task 3 dies of it some times, which leaves a file each
time in a folder. Writes what came of each to FOLDER/found.json.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_prune.errors import ConfigError, YoloPruneError
from yolo_prune.search.workers import RayPool, connected

SCENARIOS = {
    "one_dies": (1, [[0, 1], [2, 3, 4, 5, 6, 7]]),
    "all_die": (99, [[3]]),
    "bad_task": (0, [[1, 100]]),
    "bad_work": (-1, [[1]]),
}
"""By name: how many die, and the numbers of each round."""


@dataclass
class Squares:
    """Makes the work."""

    folder: Path
    deaths: int

    def __call__(self) -> Callable[[int], int]:
        if self.deaths < 0:
            raise ConfigError("less than no deaths", expected="a number of them")
        return self.square

    def square(self, number: int) -> int:
        dead = len(list(self.folder.iterdir()))
        if number == 3 and dead < self.deaths:
            (self.folder / str(dead)).touch()
            os._exit(1)
        if number == 100:
            raise ConfigError("a hundred", expected="less")
        return number**2


def came_of(ray: Any, folder: Path, deaths: int, rounds: list[list[int]]) -> dict[str, Any]:
    """Return results and deaths, or the error."""
    folder.mkdir()
    found: dict[int, int] = {}
    try:
        pool = RayPool(ray, Squares(folder, deaths), cpus=1, gpus=0.0)
        for numbers in rounds:
            found |= dict(pool.work_off({number: number for number in numbers}))
    except YoloPruneError as error:
        return {"error": type(error).__name__, "found": error.found, "code": error.exit_code}
    return {"results": found, "dead": len(list(folder.iterdir()))}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ray = connected("local")
    found = {name: came_of(ray, folder / name, *scenario) for name, scenario in SCENARIOS.items()}
    (folder / "found.json").write_text(json.dumps(found))
    ray.shutdown()
