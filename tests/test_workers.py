"""Tasks on a Ray cluster: the same results as in turn; a worker that dies is replaced."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_search import numbered, require_a_winner, words_for

from yolo_prune.errors import ConfigError, MissingDependencyError, WorkerError
from yolo_prune.search.workers import TRIES, InProcess, RayPool, connected, on_ray

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def came(tmp_path_factory) -> dict[str, Any]:
    """What came of the scenarios of `ray_process.py`; one cluster for all of them."""
    folder = tmp_path_factory.mktemp("ray")
    words = [sys.executable, str(HERE / "ray_process.py"), str(folder)]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    return json.loads((folder / "found.json").read_text())


def test_in_process():
    assert list(InProcess(lambda task: task * 2).work_off({3: 1, 1: 5})) == [(3, 2), (1, 10)]


@pytest.mark.slow
class TestOnRay:
    @pytest.mark.exhaustive
    def test_one_that_dies_is_replaced_and_its_task_done(self, came):
        results = {int(number): result for number, result in came["one_dies"]["results"].items()}
        assert results == {number: number**2 for number in range(8)}
        assert came["one_dies"]["dead"] == 1

    @pytest.mark.exhaustive
    def test_a_task_of_which_all_die_is_given_up(self, came):
        assert came["all_die"]["error"] == "WorkerError"
        assert came["all_die"]["found"].startswith(f"{TRIES} workers died of task 3")

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(("scenario", "found"), [("bad_task", "a hundred"), ("bad_work", "less than no deaths")])
    def test_bad_input_there_is_bad_input_here(self, came, scenario, found):
        assert came[scenario] == {"error": "ConfigError", "found": found, "code": 2}

    def test_search_with_a_worker_killed_finds_what_one_process_finds(self, command, known_detector, tmp_path):
        here, there = (
            words_for(*known_detector, tmp_path / name, candidates=8, target_macs=0.8, seed=2, threads=1)
            for name in ("a", "b")
        )
        assert command(*here).code == 0
        require_a_winner(numbered(tmp_path / "a"))
        process = subprocess.Popen(
            [sys.executable, "-m", "yolo_prune", *there, "ray=local"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        record = tmp_path / "b" / "candidates.jsonl"
        while not record.is_file():
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.02)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        output = process.communicate(timeout=200)[0].decode()
        assert process.returncode == 0, output
        found, expected = (facts(numbered(tmp_path / name)) for name in ("b", "a"))
        assert found == expected
        plans = [(tmp_path / name / "best.json").read_text() for name in ("a", "b")]
        assert plans[0] == plans[1]


def facts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on who scored."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def workers_of(driver: int) -> list[int]:
    """Processes of a driver's cluster that score."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")[0]
            parents = ancestors(int(folder.name)) if words.startswith(b"ray::_Worker") else []
        except (OSError, ValueError):
            continue
        if driver in parents:
            found.append(int(folder.name))
    return sorted(found)


def ancestors(process: int) -> list[int]:
    found = []
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(process)
    return found


class FakeRay:
    """A cluster of two cores on which workers start, or do not; tasks are done at once.

    Args:
        failing: How many workers die on their way before one comes; None for all.
        places: Cores.
        silent: Nobody ever answers.
    """

    class exceptions:  # noqa: N801  # Ray's own name
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    def __init__(self, failing: int | None, *, places: int = 2, silent: bool = False) -> None:
        self.failing, self.places, self.silent, self.hired = failing, places, silent, 0

    def put(self, value: Any) -> Any:
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(self.places)}}]

    def remote(self, **_: Any) -> Any:
        ray = self

        class Remote:
            def __init__(self, function: Any) -> None:
                self.remote = function

        class Actor:
            def __init__(self, kind: Any) -> None:
                self._kind = kind

            def remote(self, make: Any) -> Any:
                ray.hired += 1
                number, worker = ray.hired, self._kind(make)
                dies = ray.failing is None or number <= ray.failing
                handle = type("Handle", (), {})()
                handle.ready = Remote(lambda: ("error" if dies else "fine", number, None))
                handle.work = Remote(lambda task: ("fine", (number, task), worker.work(task)))
                return handle

        return Actor

    def wait(self, promises: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return ([], promises) if self.silent else (promises[:1], promises[1:])

    def get(self, promise: Any) -> Any:
        if promise[0] == "error":
            raise self.exceptions.RayTaskError("ray::_Worker() at host\nModuleNotFoundError: nothing here")
        return promise[2]


class TestWorkersThatDoNotCome:
    def test_are_replaced_while_some_come(self):
        ray = FakeRay(failing=3)
        pool = RayPool(ray, lambda: abs, cpus=1, gpus=0.0)
        assert dict(pool.work_off({number: -number for number in range(5)})) == {number: number for number in range(5)}
        assert ray.hired == 5  # three died, two places

    def test_end_the_work_where_none_comes(self):
        ray = FakeRay(failing=None)
        pool = RayPool(ray, lambda: abs, cpus=1, gpus=0.0)
        with pytest.raises(WorkerError, match="6 workers died before their first task: ModuleNotFoundError"):
            list(pool.work_off({0: 1}))
        assert ray.hired <= TRIES * ray.places + 1

    def test_are_not_waited_for_for_ever(self):
        pool = RayPool(FakeRay(failing=0, silent=True), lambda: abs, cpus=1, gpus=0.0)
        with pytest.raises(WorkerError, match="no worker came"):
            list(pool.work_off({0: 1}))

    def test_have_no_room(self):
        with pytest.raises(ConfigError, match="1 CPU cores and 0 GPUs"):
            RayPool(FakeRay(failing=0, places=1), lambda: abs, cpus=2, gpus=0.0)


class TestBadInput:
    @pytest.mark.parametrize("address", ["nowhere", "host:port", "ray://"])
    def test_what_is_no_address(self, address):
        with pytest.raises(ConfigError, match="ray="):
            connected(address)

    @pytest.mark.parametrize("error", [ConnectionRefusedError("refused"), UnicodeError("label empty")])
    def test_nobody_answers(self, monkeypatch, error):
        def refuse(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(socket, "create_connection", refuse)
        with pytest.raises(ConfigError, match=r"ray=127\.0\.0\.1:1 does not answer"):
            connected("127.0.0.1:1")

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingDependencyError, match="package 'ray'"):
            on_ray(lambda: abs, address="local").__enter__()

    def test_as_a_flag(self, refused, dense_checkpoint, data, monkeypatch):
        def refuse(*_: Any, **__: Any) -> None:
            raise ConnectionRefusedError("connection refused")

        monkeypatch.setattr(socket, "create_connection", refuse)
        said = refused(*words_for(dense_checkpoint, data, Path("s")), "ray=127.0.0.1:1")
        assert "does not answer" in said
