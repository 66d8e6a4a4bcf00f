"""What the machine did while it was measured: clocks, heat, throttling, and what others ran on it meanwhile.

Plain files alone, which need no rights: Linux' cpufreq, thermal zones and `/proc/stat`; the firmware's word on a
Raspberry Pi; the power mode and the GPU's clock on a Jetson. What a machine does not tell is None.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping

CLOCK_MOVED = 0.05
"""A clock that moved by a larger fraction is warned of."""

OTHERS_BUSY_CORES = 0.1
"""So is work of others that kept more than this many cores busy."""

_LEAST_S = 1.0  # the kernel counts in ticks of 10 ms, which say nothing of a shorter time
_THROTTLED = 0b1111  # of the Pi's firmware: voltage too low, clock capped, throttled, too hot; higher bits are history


@dataclass(frozen=True)
class Look:
    """One look at the machine.

    Attributes:
        cpu_mhz: Highest clock among the cores that this process may use.
        gpu_mhz: The GPU's clock (Jetson).
        temperature_c: Of the hottest thermal zone.
        throttled: Whether the firmware holds the CPU back (Raspberry Pi).
    """

    cpu_mhz: float | None
    gpu_mhz: float | None
    temperature_c: float | None
    throttled: bool | None

    @classmethod
    def at(cls, root: Path) -> Look:
        """Look at the machine whose file system begins at `root`."""
        return cls(
            cpu_mhz=_cpu_mhz(root),
            gpu_mhz=_highest(_gpu_clocks(root), scale=1e-6),
            temperature_c=_highest(root.glob("sys/class/thermal/thermal_zone*/temp"), scale=1e-3),
            throttled=_throttled(root),
        )


@dataclass(frozen=True)
class Conditions:
    """The machine before, during and after a measurement.

    Attributes:
        before: A look before the first run: an idle machine may clock low.
        after: A look after the last run.
        cpu_mhz: Lowest and highest CPU clock of the looks that followed each round at once.
        gpu_mhz: The same of the GPU.
        throttled: Whether the firmware held the CPU back at any look.
        others_busy_cores: How many cores other processes kept busy on average, or a hypervisor took away; None where
            nobody tells, or the time was too short to tell.
        power_mode: A Jetson's, such as `15W`.
        gpus: Names of NVIDIA GPUs beside the CPU.
    """

    before: Look
    after: Look
    cpu_mhz: tuple[float, float] | None = None
    gpu_mhz: tuple[float, float] | None = None
    throttled: bool | None = None
    others_busy_cores: float | None = None
    power_mode: str | None = None
    gpus: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Conditions:
        """Undo `asdict` after JSON."""
        tuples = {key: tuple(value[key]) for key in ("cpu_mhz", "gpu_mhz", "gpus") if value.get(key) is not None}
        return cls(**{**value, **tuples, "before": Look(**value["before"]), "after": Look(**value["after"])})

    def warnings(self) -> list[str]:
        """Say what makes the figures doubtful."""
        found = [
            f"the {name}'s clock moved between {clocks[0]:.0f} and {clocks[1]:.0f} MHz"
            for name, clocks in (("CPU", self.cpu_mhz), ("GPU", self.gpu_mhz))
            if clocks is not None and clocks[1] - clocks[0] > CLOCK_MOVED * clocks[1]
        ]
        if self.throttled:
            found.append("the firmware held the CPU back: too hot, or too little voltage")
        if (self.others_busy_cores or 0.0) > OTHERS_BUSY_CORES:
            found.append(f"other processes kept {self.others_busy_cores:.1f} cores busy")
        return found


class Watch:
    """Watches the machine from its making on: `look` after every round, `conditions` at the end.

    Args:
        root: Where the machine's file system begins.
        own_s: This process's CPU time in seconds, all threads together.
        clock_s: Monotonic clock in seconds.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        own_s: Callable[[], float] = time.process_time,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._own_s, self._clock_s = root, own_s, clock_s
        self._before = Look.at(root)
        self._looks: list[Look] = []
        self._start = (clock_s(), own_s(), _busy_s(root))

    def look(self) -> None:
        """Take a look; to be called right after work, before the clocks fall."""
        self._looks.append(Look.at(self._root))

    def conditions(self) -> Conditions:
        """Return what was seen."""
        others = self._others_busy_cores()
        after = Look.at(self._root)
        throttled = [look.throttled for look in (self._before, *self._looks, after) if look.throttled is not None]
        return Conditions(
            before=self._before,
            after=after,
            cpu_mhz=_range(look.cpu_mhz for look in self._looks),
            gpu_mhz=_range(look.gpu_mhz for look in self._looks),
            throttled=any(throttled) if throttled else None,
            others_busy_cores=others,
            power_mode=_power_mode(self._root),
            gpus=gpu_names(self._root),
        )

    def _others_busy_cores(self) -> float | None:
        start_s, own_before, busy_before = self._start
        busy, seconds = _busy_s(self._root), self._clock_s() - start_s
        if busy is None or busy_before is None or seconds < _LEAST_S:
            return None
        return max((busy - busy_before - (self._own_s() - own_before)) / seconds, 0.0)


def _range(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Return the lowest and the highest of the values that are known."""
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None


def _cpu_mhz(root: Path) -> float | None:
    """Return the highest clock of the usable cores: cpufreq's word, or on x86 `/proc/cpuinfo`'s."""
    folder = root / "sys/devices/system/cpu"
    by_core = _highest((folder / f"cpu{core}/cpufreq/scaling_cur_freq" for core in usable_cores()), scale=1e-3)
    if by_core is not None:
        return by_core
    found = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text(root / "proc/cpuinfo"), re.MULTILINE)]
    return max(found) if found else None


def _gpu_clocks(root: Path) -> Iterator[Path]:
    """Yield the files of a Jetson's GPU clock in Hz: the kernel calls the GPU by its address and its kind."""
    for kind in ("gpu", "ga10b", "gv11b", "gp10b"):
        yield from root.glob(f"sys/class/devfreq/*.{kind}/cur_freq")


def usable_cores() -> list[int]:
    """Return the numbers of the CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def _busy_s(root: Path) -> float | None:
    """Return the seconds that the usable cores worked since the start, for anyone or for another virtual machine."""
    wanted = {f"cpu{core}" for core in usable_cores()}
    lines = [line.split() for line in _text(root / "proc/stat").splitlines() if line.partition(" ")[0] in wanted]
    if not lines:
        return None
    # user, nice, system, (idle, waiting for a disk,) interrupts, soft interrupts, stolen; guests are counted in user
    ticks = sum(int(words[at]) for words in lines for at in (1, 2, 3, 6, 7, 8))
    return ticks / float(os.sysconf("SC_CLK_TCK"))


def _throttled(root: Path) -> bool | None:
    """Return what the Raspberry Pi's firmware says of now."""
    word = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled").strip()
    try:
        return bool(int(word, 16) & _THROTTLED)
    except ValueError:
        return None


def _power_mode(root: Path) -> str | None:
    """Return the name of a Jetson's power mode, or its number where no name is given for it."""
    mode = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if mode is None:
        return None
    number = int(mode.group(1))
    name = re.search(rf"POWER_MODEL\s+ID={number}\s+NAME=(\S+)", _text(root / "etc/nvpmodel.conf"))
    return name.group(1) if name else str(number)


def gpu_names(root: Path) -> tuple[str, ...]:
    """Return the names that NVIDIA's driver gives its GPUs."""
    texts = (_text(file) for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information")))
    found = (re.search(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE) for text in texts)
    return tuple(match.group(1) for match in found if match)


def _highest(files: Iterable[Path], *, scale: float) -> float | None:
    """Return the largest number in files of one number, scaled; a zone that is switched off cannot be read."""
    words = (_text(file).strip() for file in files)
    numbers = [int(word) * scale for word in words if re.fullmatch(r"-?\d+", word)]
    return max(numbers) if numbers else None


def _text(file: Path) -> str:
    """Return the content of a file of the kernel; nothing where it is not there or not for us."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
