"""Two processes never work in one folder: the second is refused, and a process that died holds nothing."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import contents, run_settings, words_of

from yolo_prune.claims import LOCK, claimed
from yolo_prune.errors import OutputError
from yolo_prune.hosts.ultralytics.grafting_files import epochs_done

HOLD = """
import sys
from pathlib import Path
from yolo_prune.claims import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold a folder."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_has_one_worker_at_a_time(tmp_path):
    with held(tmp_path), pytest.raises(OutputError, match="another process works in"), claimed(tmp_path):
        pytest.fail("two at once")
    with claimed(tmp_path):
        pass


def test_one_that_was_killed_holds_nothing(tmp_path):
    with held(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claimed(tmp_path):
            pass


def test_of_one_process_too(tmp_path):
    with claimed(tmp_path), pytest.raises(OutputError, match="another process"), claimed(tmp_path):
        pytest.fail("two at once")


def test_the_folder_is_made_and_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    with claimed(tmp_path / "new" / "folder"):
        assert (tmp_path / "new" / "folder").is_dir()


def test_what_cannot_be_locked_is_told(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(OutputError, match="cannot write"), claimed(tmp_path):
        pytest.fail("no lock")


def killed(times: str) -> list[str]:
    """Return the words of a process that dies when it has saved so many checkpoints."""
    return [sys.executable, str(Path(__file__).with_name("killed_process.py")), "on_model_save", times]


class TestCommands:
    """Begun once, then held by another process, each refuses to go on, and leaves everything as it is."""

    @pytest.fixture
    def refused_in(self, desk, command):
        def run(folder: Path, words: list[str], *, rewritten: str = "") -> str:
            with held(folder):
                before = contents(desk)
                outcome = command(*words)
            assert outcome.code == 2, outcome.out
            after = contents(desk)
            assert {name for name in {*before, *after} if before.get(name) != after.get(name)} <= {rewritten}
            return outcome.err

        return run

    def test_run(self, dense, data, desk, command, refused_in, monkeypatch):
        def died(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("yolo_prune.pipeline.run.train_in", died)
        words = ["run", str(run_settings(desk, data)), f"model={dense}"]
        with contextlib.suppress(KeyboardInterrupt):
            command(*words)
        assert (desk / "run" / "run.json").is_file()
        assert "another process works in" in refused_in(desk / "run", words)

    @pytest.mark.parametrize("verb", ["search", "cliff", "sensitivity", "profile"])
    def test_what_keeps_a_record(self, verb, dense, data, desk, refused_in):
        (desk / verb).mkdir()
        assert "another process works in" in refused_in(desk / verb, words_of(verb, dense, data, desk))

    def test_a_training_that_is_resumed(self, slim, data, desk, refused_in):
        words = [f"data={data}", "imgsz=64", "batch=8", "workers=0", "plots=false", "verbose=false", "val=false"]
        words += [f"project={desk}", "name=a"]
        begun = ["finetune", f"model={slim}", "epochs=2", *words]
        subprocess.run([*killed("1"), *begun], check=False, capture_output=True)
        again = ["train", f"model={desk / 'a' / 'weights' / 'last.pt'}", "resume=true"]
        # The host's trainer notes its settings when it is made, as every resumed training does.
        assert "another process works in" in refused_in(desk / "a", again, rewritten="a/args.yaml")

    @pytest.mark.slow
    def test_networks_that_are_grafted(self, slim, data, desk, refused_in):
        """One has saved an epoch more than the other: to resume brings it back, under a process that still trains."""
        words = ["imgsz=32", "batch=8", "workers=0", "plots=false", "verbose=false", "val=false", "method=grafting"]
        begun = ["train", f"model={slim}", f"data={data}", "epochs=2", f"project={desk}", "name=a", *words]
        subprocess.run([*killed("3"), *begun], check=False, capture_output=True)
        assert [epochs_done(desk / "a" / name) for name in ("net1", "net2")] == [2, 1]
        again = ["train", f"model={desk / 'a' / 'net1' / 'weights' / 'last.pt'}", "resume=true"]
        assert "another process works in" in refused_in(desk / "a", again)
        assert "another process works in" in refused_in(desk / "a", [*begun, "exist_ok=true"])
