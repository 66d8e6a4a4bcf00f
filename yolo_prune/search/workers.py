"""Who works: this process, or Ray's on this machine and others. The results are the same, whoever they come from."""

from __future__ import annotations

import collections
import importlib
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

from yolo_prune.errors import ConfigError, MissingDependencyError, WorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")

Work: TypeAlias = Callable[[Task], Result]
"""Does one task after the other; what it returns depends on the task alone."""

TRIES = 3
"""Workers that may die of one task before it is given up."""

ANSWER_S = 5.0
"""Seconds in which a cluster has to answer."""


def in_turn(work: Work[Task, Result], tasks: Mapping[int, Task]) -> Iterator[tuple[int, Result]]:
    """Yield the result of each task, under its number, done one after the other in this process."""
    for number, task in tasks.items():
        yield number, work(task)


def on_ray(
    make: Callable[[], Work[Task, Result]],
    tasks: Mapping[int, Task],
    *,
    address: str,
    cpus: int = 1,
    gpus: float = 0.0,
) -> Iterator[tuple[int, Result]]:
    """Yield the result of each task, under its number, as the workers of a Ray cluster finish them.

    A worker that dies is replaced, and its task is tried again.

    Args:
        make: Makes the work; called once in each worker, on the machine where that runs.
        tasks: Tasks by number.
        address: `auto` (the cluster that runs on this machine), `local` (one that is started for this call), or an
            address that `ray.init` knows.
        cpus: CPU cores, and threads, of a worker.
        gpus: GPUs of a worker.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigError: The cluster does not answer, or has no room for a worker.
        WorkerError: A task that workers keep dying of.
    """
    if not tasks:
        return
    ray = connected(address)
    try:
        yield from _Crew(ray, make, cpus=cpus, gpus=gpus, most=len(tasks)).work_off(tasks)
    finally:
        ray.shutdown()


def connected(address: str) -> Any:
    """Return the package `ray`, connected to a cluster.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigError: The cluster does not answer.
    """
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingDependencyError("ray", extra="search", purpose="score candidates on several processes") from error
    _require_answer(address)
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise _silent(address, error) from error
    return ray


def _require_answer(address: str) -> None:
    """Try the door first: Ray itself knocks for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if address in ("auto", "local"):
        return
    if not colon or not port.isdigit():
        raise ConfigError(f"ray={address}", expected="auto, local or HOST:PORT", remedy="ray=192.168.0.7:6379")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise _silent(address, error) from error


def _silent(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"ray={address} does not answer: {error}",
        expected="a Ray cluster that runs",
        remedy="start one with `ray start --head`, or ray=local for one of this machine",
    )


class _Crew:
    """The workers of a cluster.

    Args:
        ray: The package, connected.
        make: Makes the work.
        cpus: Of a worker.
        gpus: Of a worker.
        most: Most workers that are of use.
    """

    def __init__(self, ray: Any, make: Callable[[], Work[Any, Any]], *, cpus: int, gpus: float, most: int) -> None:
        self._ray, self._make = ray, ray.put(make)
        threads = {"env_vars": {"OMP_NUM_THREADS": str(cpus)}}
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus, runtime_env=threads)(_Worker)
        found = ray.cluster_resources()
        room = int(found.get("CPU", 0) // cpus)
        if gpus:
            room = min(room, int(found.get("GPU", 0) // gpus))
        if room < 1:
            raise ConfigError(
                f"the Ray cluster has {found.get('CPU', 0):g} CPU cores and {found.get('GPU', 0):g} GPUs",
                expected=f"{cpus} cores and {gpus:g} GPUs for a worker",
            )
        self._idle = [self._hire() for _ in range(min(room, most))]

    def work_off(self, tasks: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
        """Yield the result of each task as it is done."""
        waiting, deaths = collections.deque(tasks), collections.Counter[int]()
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            while waiting and self._idle:
                number, worker = waiting.popleft(), self._idle.pop()
                running[worker.work.remote(tasks[number])] = (number, worker)
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            number, worker = running.pop(done)
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                deaths[number] += 1
                if deaths[number] >= TRIES:
                    how = str(error).strip().partition("\n")[0]
                    raise WorkerError(f"{TRIES} workers died of task {number}: {how}") from error
                worker = self._hire()
                waiting.appendleft(number)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error
            else:
                yield number, result
            self._idle.append(worker)

    def _hire(self) -> Any:
        return self._actor.remote(self._make)


class _Worker:
    """A process that makes the work once and then does tasks."""

    def __init__(self, make: Callable[[], Work[Any, Any]]) -> None:
        self._work = make()

    def work(self, task: Any) -> Any:
        """Do a task."""
        return self._work(task)
