"""Who works: this process, or Ray's on this machine and others. The results are the same, whoever they come from."""

from __future__ import annotations

import collections
import contextlib
import importlib
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from yolo_prune.errors import ConfigError, MissingDependencyError, WorkerError

Work: TypeAlias = Callable[[Any], Any]
"""Does one task after the other; what it returns depends on the task alone."""

TRIES = 3
"""Workers that may die of one task before it is given up."""

ANSWER_S = 5.0
"""Seconds in which a cluster has to answer."""

READY_S = 120.0
"""Seconds in which one worker has to be there, if none is."""


class WorkerPool(Protocol):
    """Those who work."""

    def work_off(self, tasks: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
        """Yield the result of each task under its number, in the order in which they are done."""
        ...


class InProcess:
    """This process: one task after the other."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def work_off(self, tasks: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
        """Yield the result of each task, in order."""
        for number, task in tasks.items():
            yield number, self._work(task)


@contextlib.contextmanager
def on_ray(make: Callable[[], Work], *, address: str, cpus: int = 1, gpus: float = 0.0) -> Iterator[WorkerPool]:
    """Yield the workers of a Ray cluster; one that dies is replaced, and its task is tried again.

    Args:
        make: Makes the work; called once in each worker, on the machine where that runs.
        address: `auto` (the cluster that runs on this machine), `local` (one that is started now), or an address that
            `ray.init` knows.
        cpus: CPU cores, and threads, of a worker.
        gpus: GPUs of a worker.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigError: The cluster does not answer, or has no room for a worker.
        WorkerError: No worker comes, or workers keep dying of a task.
    """
    ray = connected(address)
    try:
        yield RayPool(ray, make, cpus=cpus, gpus=gpus)
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
    except (OSError, OverflowError, UnicodeError) as error:
        raise _silent(address, error) from error


def _silent(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"ray={address} does not answer: {error}",
        expected="a Ray cluster that runs",
        remedy="start one with `ray start --head`, or ray=local for one of this machine",
    )


class RayPool:
    """The workers of a cluster. Tasks go only to those who have said that they are there.

    Args:
        ray: The package, connected.
        make: Makes the work.
        cpus: Of a worker.
        gpus: Of a worker.
    """

    def __init__(self, ray: Any, make: Callable[[], Work], *, cpus: int, gpus: float) -> None:
        self._ray, self._make = ray, ray.put(make)
        threads = {"env_vars": {"OMP_NUM_THREADS": str(cpus)}}
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus, runtime_env=threads)(_Worker)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._room = sum(_room(node, cpus=cpus, gpus=gpus) for node in nodes)
        if self._room < 1:
            found = ", ".join(f"{node.get('CPU', 0):g} CPU cores and {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise ConfigError(f"hosts with {found}", expected=f"one with {cpus} cores and {gpus:g} GPUs for a worker")
        self._coming: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._lost = 0  # workers that died on their way since one came

    def work_off(self, tasks: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
        """Yield the result of each task as it is done."""
        waiting, deaths = collections.deque(tasks), collections.Counter[int]()
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            for _ in range(min(self._room, len(tasks)) - len(self._idle) - len(self._coming) - len(running)):
                self._hire()
            while waiting and self._idle:
                number, worker = waiting.popleft(), self._idle.pop()
                running[worker.work.remote(tasks[number])] = (number, worker)
            done = self._next([*running, *(self._coming if waiting else ())], alone=not running)
            if done in self._coming:
                self._greet(done)
                continue
            number, worker = running.pop(done)
            result = self._result(done, number, deaths)
            if result is _DEAD:
                waiting.appendleft(number)
            else:
                self._idle.append(worker)
                yield number, result

    def _next(self, promises: list[Any], *, alone: bool) -> Any:
        """Return the promise that is kept first.

        Raises:
            WorkerError: Nobody works, and nobody comes.
        """
        done, _ = self._ray.wait(promises, num_returns=1, timeout=READY_S if alone else None)
        if not done:
            raise WorkerError(
                f"no worker came in {READY_S:g} s",
                expected="a free place on the cluster",
                remedy="`ray status` says what else runs there",
            )
        return done[0]

    def _hire(self) -> None:
        worker = self._actor.remote(self._make)
        self._coming[worker.ready.remote()] = worker

    def _greet(self, promise: Any) -> None:
        """Let a worker in that has come; one that died on its way is forgotten, and another one will be hired.

        Raises:
            WorkerError: As many have died as every place would have tried, and none came.
        """
        worker = self._coming.pop(promise)
        try:
            self._ray.get(promise)
        except self._ray.exceptions.RayError as error:
            self._lost += 1
            if self._lost >= TRIES * self._room:
                raise WorkerError(
                    f"{self._lost} workers died before their first task: {_last_line(error)}",
                    expected="workers that start",
                    remedy="the package and what it needs, in the same version, on every host of the cluster",
                ) from error
            return
        self._lost = 0
        self._idle.append(worker)

    def _result(self, promise: Any, number: int, deaths: collections.Counter[int]) -> Any:
        """Return the result of a task, or that its worker is dead.

        Raises:
            WorkerError: So are all who tried it.
            YoloPruneError: What the work itself raised.
        """
        try:
            return self._ray.get(promise)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            deaths[number] += 1
            if deaths[number] >= TRIES:
                raise WorkerError(f"{TRIES} workers died of task {number}: {_first_line(error)}") from error
            return _DEAD


def _first_line(error: Exception) -> str:
    """Return how a worker died; Ray tells more of it below."""
    return str(error).strip().partition("\n")[0]


def _last_line(error: Exception) -> str:
    """Return what a worker raised; Ray tells where above it."""
    return str(error).strip().rpartition("\n")[2]


_DEAD = object()
"""Instead of a result."""


def _room(resources: Mapping[str, float], *, cpus: int, gpus: float) -> int:
    """Return how many workers fit on one host."""
    room = int(resources.get("CPU", 0) // cpus)
    return min(room, int(resources.get("GPU", 0) // gpus)) if gpus else room


class _Worker:
    """A process that makes the work with its first task: what goes wrong then is told like any other failure."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self._make = make
        self._work: Work | None = None

    def ready(self) -> None:
        """Say that it is there."""

    def work(self, task: Any) -> Any:
        """Do a task."""
        if self._work is None:
            self._work = self._make()
        return self._work(task)
