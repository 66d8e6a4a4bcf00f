"""The `pi` bundle on aarch64, without a Raspberry Pi: its runner in an emulated arm64 Debian, beside this machine.

python tools/emulate_aarch64.py model=slim.pt cache=runs/arm64 out=runs/pi [imgsz=320] [data=data.yaml] [conf=0.25]

Needs root, a Debian that can mount binfmt_misc, and: apt install debootstrap qemu-user-static. A minimal arm64 Debian
with python3 is made in `cache` once (some minutes), and the aarch64 wheels of the bundle's packages are put into it.
Then the bundle is made, shown to it read-only under a name with spaces and umlauts, and `run.py check` and `run.py
detect` run there. What is detected has to be what the same runner detects here, box by box. Emulation takes seconds for
a forward pass in NCNN and more in ONNX Runtime: 320 px and a few images are enough.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolo_prune.cli import execute, script
from yolo_prune.configuration import json_setting, setting
from yolo_prune.device.reference import overlap
from yolo_prune.errors import ConfigError, ExportError, ParityError
from yolo_prune.export.bundling import DEVICE_KINDS
from yolo_prune.pipeline.bundle import BundleConfig, bundle
from yolo_prune.report import render

SUITE, PYTHON = "bookworm", "3.11"  # Raspberry Pi OS of 2023 to 2025
PACKAGES = ("python3", "libstdc++6", "libgomp1")
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_28_aarch64", "manylinux_2_27_aarch64")
SITE = "opt/runtimes"  # where the wheels are, in the emulated system
MOUNTED = "media/räk smörgås/pi bündel"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
RULE = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")

# Mounts of its own, which end with the process; the bundle is read-only. $1: root, $2: bundle, $3: where it is shown.
ENTER = """
set -e
mount --make-rprivate /
mount -t proc proc "$1/proc"
mount --bind /dev "$1/dev"
mount --bind "$2" "$1/$3"
mount -o remount,bind,ro "$1/$3"
root=$1; shift 3
exec chroot "$root" "$@"
"""


@dataclass(kw_only=True)
class EmulationConfig:
    """Settings of the emulation."""

    model: str = setting(help="checkpoint (.pt), dense or slim")
    cache: str = setting(help="folder of the emulated system; used again where it is complete")
    out: str = setting(help="new folder for the bundle")
    imgsz: int = setting(320, help="image side", unit="px")
    data: str | None = setting(None, help="data yaml whose val images are looked at; default: drawn images")
    images: int = setting(3, help="number of them", unit="images")
    conf: float = setting(0.25, help="lowest score of detections that are compared")
    json: str | None = json_setting("the comparison")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Detections there beside those here, of one runtime.

    Attributes:
        backend: The runtime.
        here: Number of detections on this machine.
        there: Number in the emulated system.
        paired: Those of the same image and class whose boxes overlap most.
        overlap: Lowest IoU among them.
        box_px: Largest difference of a side of a box among them, in pixels of the image.
        score: Largest difference of a score among them.
        unpaired_score: Highest score, above the threshold, among the others: a score that is next to the threshold may
            fall on either side of it.
        forward_s: Median seconds of a forward pass there.
    """

    backend: str
    here: int
    there: int
    paired: int
    overlap: float
    box_px: float
    score: float
    unpaired_score: float
    forward_s: float

    @property
    def same(self) -> bool:
        """Whether boxes lie on each other and scores are equal but for rounding.

        NCNN computes in half precision on ARM, which rounds a side of a box that is some strides long by a pixel.
        """
        rounding, covered = (0.02, 0.9) if self.backend == "ncnn" else (1e-3, 0.999)
        return self.overlap >= covered and self.score <= rounding and self.unpaired_score <= rounding


@dataclass(frozen=True, kw_only=True)
class EmulationResult:
    """What ran there.

    Attributes:
        check: Output of `run.py check`, whose exit code was 0.
        comparisons: One a runtime.
    """

    check: str
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        comparisons = [{**asdict(one), "same": one.same} for one in self.comparisons]
        return {"check": self.check.splitlines(), "comparisons": comparisons}

    def table(self) -> str:
        """Return what `check` said, and a row for each runtime."""
        rows = [
            [one.backend, str(one.here), str(one.there), str(one.paired), f"{one.overlap:.3f}", f"{one.box_px:.2f}",
             f"{one.score:.4f}", f"{one.unpaired_score:.4f}", f"{one.forward_s:.1f}", "yes" if one.same else "NO"]
            for one in self.comparisons
        ]  # fmt: skip
        headings = [
            "runtime",
            "here",
            "aarch64",
            "paired",
            "lowest IoU",
            "box px",
            "score",
            "unpaired",
            "forward s",
            "same",
        ]
        return self.check + render(headings, rows)


def emulate(config: EmulationConfig) -> EmulationResult:
    """Make the bundle, run it there and here, and compare.

    Raises:
        YoloPruneError: No root, a missing tool, a bundle that cannot be made or does not run there.
    """
    _require_tools()
    root = _system(Path(config.cache))
    made = bundle(
        BundleConfig(
            model=config.model, target="pi", out=config.out, imgsz=config.imgsz, data=config.data, images=config.images
        )
    )
    there = _There(root=root, bundle=made.out.resolve())
    check = there.run("check", "threads=1")
    comparisons = []
    for artefact in made.bundle.artefacts:
        words = ["detect", f"backend={artefact.backend}", f"conf={config.conf}", "threads=1"]
        emulated = _lines(there.run(*words, f"source=/{MOUNTED}/reference"))
        command = [sys.executable, str(made.out / "run.py"), *words, f"source={made.out / 'reference'}"]
        native = _lines(_output(command, "the runner on this machine"))
        comparisons.append(compare(artefact.backend, native, emulated, config.conf))
    return EmulationResult(check=check, comparisons=tuple(comparisons))


def compare(
    backend: str, here: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]], conf: float
) -> Comparison:
    """Pair the detections of the same images.

    Args:
        backend: The runtime.
        here: Lines of `run.py detect` on this machine, in the order of the images.
        there: The same of the emulated system.
        conf: Threshold of both.
    """
    pairs, left = [], []
    for one, other in zip(here, there, strict=True):
        open_ones = list(other["detections"])
        for detection in one["detections"]:
            same = [candidate for candidate in open_ones if candidate["class"] == detection["class"]]
            partner = max(same, key=lambda candidate: overlap(detection["box"], candidate["box"]), default=None)
            if partner is None or overlap(detection["box"], partner["box"]) < 0.5:
                left.append(detection)
                continue
            open_ones.remove(partner)
            pairs.append((detection, partner))
        left += open_ones
    forward = sorted(line["ms"]["forward"] / 1e3 for line in there)
    gaps = [abs(a - b) for one, other in pairs for a, b in zip(one["box"], other["box"], strict=True)]
    return Comparison(
        backend=backend,
        here=sum(len(line["detections"]) for line in here),
        there=sum(len(line["detections"]) for line in there),
        paired=len(pairs),
        overlap=min((overlap(one["box"], other["box"]) for one, other in pairs), default=1.0),
        box_px=max(gaps, default=0.0),
        score=max((abs(one["score"] - other["score"]) for one, other in pairs), default=0.0),
        unpaired_score=max((one["score"] - conf for one in left), default=0.0),
        forward_s=forward[len(forward) // 2],
    )


@dataclass(frozen=True, kw_only=True)
class _There:
    """The emulated system with a bundle in it."""

    root: Path
    bundle: Path

    def run(self, *words: str) -> str:
        """Return what the bundle's runner prints there."""
        (self.root / MOUNTED).mkdir(parents=True, exist_ok=True)
        environment = ["/usr/bin/env", "-i", "LANG=C.UTF-8", f"PYTHONPATH=/{SITE}", "OMP_NUM_THREADS=1"]
        program = ["/usr/bin/python3", f"/{MOUNTED}/run.py", *words]
        enter = ["unshare", "--mount", "sh", "-c", ENTER, "sh", str(self.root), str(self.bundle), MOUNTED]
        return _output([*enter, *environment, *program], f"run.py {words[0]} on aarch64")


def _system(cache: Path) -> Path:
    """Return the root of the emulated system, made where it is not there yet."""
    _register()
    root = cache.resolve() / "rootfs"
    ready = cache / "ready"
    if ready.is_file():
        return root
    shutil.rmtree(root, ignore_errors=True)  # what an interrupted run left
    root.mkdir(parents=True)
    include = f"--include={','.join(PACKAGES)}"
    _output(["debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", include, SUITE, str(root)], "debootstrap")
    _output(["chroot", str(root), "/debootstrap/debootstrap", "--second-stage"], "debootstrap's second stage")
    platforms = [f"--platform={name}" for name in PLATFORMS]
    _output(
        [sys.executable, "-m", "pip", "install", "--quiet", *platforms, "--only-binary=:all:",
         f"--python-version={PYTHON}", f"--target={root / SITE}", *DEVICE_KINDS["pi"].packages],
        "pip install for aarch64",
    )  # fmt: skip
    ready.touch()
    return root


def _register() -> None:
    """Let the kernel start programs of aarch64 through qemu."""
    if not (BINFMT / "register").exists():
        _output(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], "mount binfmt_misc")
    if not (BINFMT / "qemu-aarch64").exists():
        (BINFMT / "register").write_bytes(RULE.read_bytes().rstrip(b"\n"))


def _require_tools() -> None:
    """Refuse a machine that cannot do it.

    Raises:
        ConfigError: Not root, or a tool is missing.
    """
    if os.geteuid():
        raise ConfigError("not root", expected="root: it mounts, and makes a Debian", remedy="run it with sudo")
    missing = [name for name in ("debootstrap", "qemu-aarch64-static", "unshare", "chroot") if not shutil.which(name)]
    if missing or not RULE.is_file():
        raise ConfigError(
            f"missing here: {', '.join(missing) or RULE}",
            expected="debootstrap and qemu's static user emulation",
            remedy="apt install debootstrap qemu-user-static",
        )


def _output(command: Sequence[str], what: str) -> str:
    """Return what a command prints.

    Raises:
        ExportError: It fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()[-8:]
        raise ExportError(f"{what} ended with code {done.returncode}:\n" + "\n".join(lines), expected="code 0")
    return done.stdout


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _work(config: EmulationConfig) -> str:
    """Return the table.

    Raises:
        ParityError: A runtime detects something else there; the table is printed all the same.
    """
    results: list[EmulationResult] = []

    def kept(config: EmulationConfig) -> EmulationResult:
        results.append(emulate(config))
        return results[0]

    table = execute(kept, config)
    different = [one.backend for one in results[0].comparisons if not one.same]
    if different:
        print(table, end="")
        raise ParityError(
            f"{', '.join(different)}: other detections on aarch64", expected="the same boxes and scores as here"
        )
    empty = [one.backend for one in results[0].comparisons if not one.paired]
    if empty:
        print(table, end="")
        raise ParityError(
            f"{', '.join(empty)}: nothing is detected on both sides, which shows nothing",
            expected="images with objects that the model knows, or a lower conf=",
        )
    return table


if __name__ == "__main__":
    sys.exit(script((__doc__ or "").partition("\n")[0], EmulationConfig, _work))
