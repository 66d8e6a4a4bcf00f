"""Dense beside slim on a GPU: without one, rows of the CPU are measured and the others say why they are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_gpu import GpuConfig, Row, bench
from conftest import ROOT
from tiny_onnx import SIDE_PX, tiny_onnx

from yolo_prune.device.benchmark_record import BenchmarkReport
from yolo_prune.errors import ConfigError


@pytest.fixture
def words(tmp_path, dense_checkpoint, slim_checkpoint):
    """The settings of a run that takes seconds."""
    onnx = [tiny_onnx(tmp_path / f"{name}.onnx") for name in ("dense", "slim")]
    models = [f"models=[{dense_checkpoint},{slim_checkpoint}]", f"onnx=[{','.join(map(str, onnx))}]"]
    return [*models, f"imgsz={SIDE_PX}", "threads=1", "runs=2", "warmup=0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is refused")
@pytest.mark.exhaustive
def test_rows_without_a_gpu(words, tmp_path):
    record = tmp_path / "gpu.json"
    ways = "ways=[onnx,onnx@cuda,pt@cuda+half]"
    command = [sys.executable, str(ROOT / "tools" / "bench_gpu.py"), *words, ways, f"json={record}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert found["gpus"] == []
    measured, provider, pytorch = found["rows"]
    report = BenchmarkReport.from_json(measured["report"])
    assert [len(entry.latencies_ms) for entry in report.entries] == [2, 2]
    assert provider["refused"].startswith("provider 'cuda' cannot be used here")
    assert "pip install onnxruntime-gpu" in provider["refused"]
    assert pytorch["refused"].startswith("PyTorch")
    assert pytorch["report"] is None
    assert "no GPU" in done.stdout
    assert "finds no CUDA device" in done.stdout


def config(tmp_path: Path, **more: object) -> GpuConfig:
    files = [str(tmp_path / name) for name in ("a", "b")]
    for file in files:
        Path(file).touch()
    return GpuConfig(**{"models": files, "onnx": files, **more})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"models": ["one.pt"]}, "expected: two"),
        ({"onnx": ["absent.onnx", "absent.onnx"]}, "'absent.onnx' of onnx= does not exist"),
        ({"ways": ["engine"]}, "way 'engine'"),
    ],
)
def test_bad_input(tmp_path, more, said):
    with pytest.raises(ConfigError, match=said):
        bench(config(tmp_path, **more))


def test_a_way_that_takes_too_long_is_a_row(tmp_path):
    rows = bench(config(tmp_path, ways=["onnx"], limit_s=0.01)).rows
    assert rows == [Row(way="onnx", refused="not done after 0.01 s")]
