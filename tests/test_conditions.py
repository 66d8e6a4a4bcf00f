"""What the machine says of itself: trees of files as kernels write them, and this machine's own."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from yolo_prune.device.conditions import Conditions, Look, Watch, usable_cores

TICKS = os.sysconf("SC_CLK_TCK")


def write(root: Path, **files: object) -> None:
    for name, content in files.items():
        path = root / NAMES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


CORE = usable_cores()[-1]
NAMES = {
    "khz": f"sys/devices/system/cpu/cpu{CORE}/cpufreq/scaling_cur_freq",
    "cpuinfo": "proc/cpuinfo",
    "stat": "proc/stat",
    "heat": "sys/class/thermal/thermal_zone0/temp",
    "other_heat": "sys/class/thermal/thermal_zone1/temp",
    "throttled": "sys/devices/platform/soc/soc:firmware/get_throttled",
    "gpu_hz": "sys/class/devfreq/17000000.ga10b/cur_freq",
    "encoder_hz": "sys/class/devfreq/154c0000.nvenc/cur_freq",
    "mode": "var/lib/nvpmodel/status",
    "modes": "etc/nvpmodel.conf",
    "gpu": "proc/driver/nvidia/gpus/0000:01:00.0/information",
}


def stat(busy_s: float) -> str:
    """A line of `/proc/stat` for the last core: its own time, an idle and waiting machine, and what was stolen."""
    half = int(busy_s * TICKS / 2)
    return f"cpu  1 2 3 4 5 6 7 8 9 10\ncpu{CORE} {half} 0 0 999 888 0 0 {half} 777 666"


class TestLook:
    def test_nothing_is_told(self, tmp_path):
        assert Look.at(tmp_path) == Look(cpu_mhz=None, gpu_mhz=None, temperature_c=None, throttled=None)

    def test_raspberry_pi(self, tmp_path):
        write(tmp_path, khz=1_800_000, heat=61_500, other_heat=48_000, throttled="50004")
        assert Look.at(tmp_path) == Look(cpu_mhz=1800, gpu_mhz=None, temperature_c=61.5, throttled=True)

    @pytest.mark.parametrize(("word", "held_back"), [("0", False), ("50000", False), ("1", True), ("what", None)])
    def test_only_what_throttles_now_counts(self, tmp_path, word, held_back):
        write(tmp_path, throttled=word)
        assert Look.at(tmp_path).throttled is held_back

    def test_jetson(self, tmp_path):
        write(tmp_path, khz=1_510_400, gpu_hz=624_750_000, encoder_hz=999_000_000)
        assert Look.at(tmp_path).gpu_mhz == pytest.approx(624.75)

    def test_x86_without_cpufreq(self, tmp_path):
        write(tmp_path, cpuinfo="cpu MHz\t\t: 2000.000\nmodel name\t: x\ncpu MHz\t\t: 2712.500")
        assert Look.at(tmp_path).cpu_mhz == 2712.5

    def test_a_zone_that_cannot_be_read(self, tmp_path):
        write(tmp_path, heat=40_000)
        (tmp_path / NAMES["other_heat"]).mkdir(parents=True)  # reading it is an error, as of a zone that is off
        assert Look.at(tmp_path).temperature_c == 40


class TestWatch:
    def test_clocks_while_it_ran(self, tmp_path):
        write(tmp_path, khz=600_000)
        watch = Watch(tmp_path)
        for khz in (1_800_000, 1_500_000, 1_790_000):
            write(tmp_path, khz=khz)
            watch.look()
        write(tmp_path, khz=700_000)
        found = watch.conditions()
        assert (found.before.cpu_mhz, found.cpu_mhz, found.after.cpu_mhz) == (600, (1500, 1800), 700)
        assert found.warnings() == ["the CPU's clock moved between 1500 and 1800 MHz"]

    def test_a_steady_clock_is_no_news(self, tmp_path):
        write(tmp_path, khz=600_000)  # idle
        watch = Watch(tmp_path)
        for khz in (1_800_000, 1_740_000):
            write(tmp_path, khz=khz)
            watch.look()
        assert watch.conditions().warnings() == []

    def test_throttled_at_any_look(self, tmp_path):
        write(tmp_path, throttled="0")
        watch = Watch(tmp_path)
        for word in ("0", "4", "0"):
            write(tmp_path, throttled=word)
            watch.look()
        assert watch.conditions().throttled is True
        assert "held the CPU back" in watch.conditions().warnings()[0]

    @pytest.mark.parametrize(("own_s", "others"), [(10.0, 0.0), (4.0, 0.6), (11.0, 0.0)])
    def test_what_others_took(self, tmp_path, own_s, others):
        """Ten of ten seconds of a core were busy; what this process did not use itself, others did."""
        write(tmp_path, stat=stat(100))
        seconds, own = iter([50.0, 60.0]), iter([1.0, 1.0 + own_s])
        watch = Watch(tmp_path, own_s=lambda: next(own), clock_s=lambda: next(seconds))
        write(tmp_path, stat=stat(110))
        found = watch.conditions()
        assert found.others_busy_cores == pytest.approx(others)
        assert bool(found.warnings()) == (others > 0)

    def test_power_mode_and_gpus(self, tmp_path):
        modes = "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=15W >"
        write(tmp_path, mode="pmode:0002", modes=modes, gpu="Model: \t\t NVIDIA H200\nIRQ: \t 11")
        found = Watch(tmp_path).conditions()
        assert (found.power_mode, found.gpus) == ("15W", ("NVIDIA H200",))
        write(tmp_path, mode="pmode:0007")
        assert Watch(tmp_path).conditions().power_mode == "7"

    def test_a_tick_in_a_moment_is_no_load(self, tmp_path):
        write(tmp_path, stat=stat(100))
        seconds = iter([50.0, 50.001])
        watch = Watch(tmp_path, own_s=lambda: 0.0, clock_s=lambda: next(seconds))
        write(tmp_path, stat=stat(100.02))
        assert watch.conditions().others_busy_cores is None

    def test_this_machine(self):
        watch = Watch()
        watch.look()
        found = watch.conditions()
        assert Conditions.from_json(json.loads(json.dumps(asdict(found)))) == found
