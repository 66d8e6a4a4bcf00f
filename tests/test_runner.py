"""The runner of a bundle: check, benchmark, build, and everything that can be wrong with them on a device."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
from bundles import NAME, manifest
from command_line import contents
from recorded_tensorrt import install

from yolo_prune.device.runtimes.engine_file import EngineFile
from yolo_prune.device.sources import read_image

BACKENDS = ("onnxruntime", "ncnn", "openvino")


@pytest.fixture
def bundle(cpu_bundle, tmp_path):
    """A bundle to be spoiled."""
    return shutil.copytree(cpu_bundle, tmp_path / NAME)


def without(monkeypatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def sign(folder) -> None:
    """Write the checksums anew, as a bundle's maker would."""
    value = manifest(folder)
    value["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in value["files"]}
    (folder / "bundle.json").write_text(json.dumps(value), encoding="utf-8")


class TestCheck:
    def test_every_artefact_agrees_and_nothing_is_written(self, runner, bundle):
        before = contents(bundle)
        code, out, _ = runner(bundle, "check")
        assert code == 0
        assert all(name in out for name in BACKENDS)
        assert out.count(" yes\n") == 3
        assert " 0 of 0 " not in out
        assert contents(bundle) == before

    def test_record(self, runner, cpu_bundle, desk):
        assert runner(cpu_bundle, "check", "json=c.json")[0] == 0
        found = json.loads((desk / "c.json").read_text())
        assert {one["backend"] for one in found} == set(BACKENDS)
        assert all(one["passed"] and one["found_again"] == one["expected"] > 0 for one in found)
        assert "already exists" in runner.refused(cpu_bundle, "check", "json=c.json")

    def test_precision_without_a_tolerance_is_judged_by_detections(self, runner, bundle):
        value = {**manifest(bundle), "tolerances": {"fp32": None}}
        (bundle / "bundle.json").write_text(json.dumps(value))
        assert runner(bundle, "check")[0] == 0
        value["reference"]["detections"] = [[], []]
        (bundle / "bundle.json").write_text(json.dumps(value))
        code, out, _ = runner(bundle, "check")
        assert (code, out.count(" NO\n")) == (1, 3)

    @pytest.mark.parametrize(
        "name",
        [
            "artefacts/slim.onnx",
            "artefacts/slim_ncnn_model/model.ncnn.bin",
            "reference/outputs.npz",
            "yolo_prune/errors.py",
        ],
    )
    def test_damaged_file_is_named(self, runner, bundle, name):
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / name).write_bytes(content)
        assert f"checksum of '{name}'" in runner.refused(bundle, "check")

    def test_missing_file_is_named(self, runner, bundle):
        (bundle / "reference" / "0001.png").unlink()
        assert "'reference/0001.png' is missing" in runner.refused(bundle, "check")

    @pytest.mark.parametrize("text", [None, "", "{", '{"format": 2}', '{"format": 1}', "[]", "3", "null", '"format"'])
    def test_unreadable_manifest(self, runner, bundle, text):
        if text is None:
            (bundle / "bundle.json").unlink()
        else:
            (bundle / "bundle.json").write_text(text)
        assert "bundle.json" in runner.refused(bundle, "check")

    @pytest.mark.parametrize(
        ("keys", "value", "said"),
        [
            (["target"], 3, "'target'"),
            (["files"], None, "'files'"),
            (["files"], {}, "'artefacts/slim_openvino_model' has no checksum"),
            (["files", "LICENSE"], None, "'files.LICENSE'"),
            (["tolerances", "fp32"], "x", "'tolerances.fp32'"),
            (["network", "imgsz_px"], None, "'network.imgsz_px'"),
            (["network", "imgsz_px"], 0, "imgsz_px"),
            (["network", "end_to_end"], 3, "'network.end_to_end'"),
            (["network", "extras"], {"a": 1}, "'network.extras.a'"),
            (["network", "classes"], [], "classes"),
            (["artefacts"], [], "artefacts"),
            (["artefacts", 0, "backend"], [], "'artefacts.0.backend'"),
            (["artefacts", 0, "bits"], 8, "bits"),
            (["reference", "images"], [3, 4], "'reference.images.0'"),
            (["reference", "images"], ["reference/0000.png"], "detections"),
            (["reference", "outputs"], None, "'reference.outputs'"),
            (["reference", "outputs"], "other.npz", "'other.npz' has no checksum"),
            (["reference", "confidence"], True, "'reference.confidence'"),
            (["reference", "detections", 0, 0], {}, "'class'"),
            (["reference", "detections", 0, 0, "box"], [1.0, 2.0], "box"),
            (["provenance"], [], "'provenance'"),
        ],
    )
    def test_manifest_of_wrong_values(self, runner, bundle, keys, value, said):
        """It has no checksum of its own: what is wrong with it is told before anything is run."""
        at = whole = manifest(bundle)
        *way, last = keys
        for key in way:
            at = at[key]
        at[last] = value
        (bundle / "bundle.json").write_text(json.dumps(whole))
        for words in (["--help"], ["check"], ["detect", f"source={bundle / 'reference'}"]):
            told = runner.refused(bundle, *words)
            assert "bundle.json" in told
            assert said in told

    def test_a_manifest_that_wants_an_engine_of_no_onnx_file(self, runner, bundle):
        value = {**manifest(bundle), "engine": "fp16"}
        value["artefacts"] = [one for one in value["artefacts"] if one["backend"] != "onnxruntime"]
        (bundle / "bundle.json").write_text(json.dumps(value))
        assert "no .onnx file" in runner.refused(bundle, "build")

    def test_other_outputs_fail(self, runner, bundle):
        file = bundle / "reference" / "outputs.npz"
        with np.load(file) as stored:
            outputs = stored["output0"]
        outputs[:, :4] += 1  # a pixel, where a hundredth of that is allowed
        np.savez(file, output0=outputs)
        sign(bundle)
        code, out, err = runner(bundle, "check")
        assert (code, out.count(" NO\n")) == (1, 3)
        assert "not what PyTorch says" in err

    def test_other_shapes_fail(self, runner, bundle):
        file = bundle / "reference" / "outputs.npz"
        np.savez(file, output0=np.zeros((2, 7, 84), np.float32))
        sign(bundle)
        assert "answers with shape" in runner.refused(bundle, "check", code=1)

    def test_detections_that_are_not_found_again_fail(self, runner, bundle):
        value = manifest(bundle)
        lost = {"class": 1, "name": "b", "score": 0.9, "box": [0.0, 0.0, 0.5, 0.5]}
        value["reference"]["detections"] = [[lost], [lost]]
        (bundle / "bundle.json").write_text(json.dumps(value))
        code, out, _ = runner(bundle, "check")
        assert code == 1
        assert "0 of 2" in out

    def test_detections_that_the_reference_lacks_fail(self, runner, bundle):
        value = manifest(bundle)
        found = sum(map(len, value["reference"]["detections"]))
        value["reference"]["detections"] = [one[:1] for one in value["reference"]["detections"]]
        (bundle / "bundle.json").write_text(json.dumps(value))
        code, out, _ = runner(bundle, "check")
        assert code == 1
        assert "2 of 2" in out
        assert f"2 of {found}" in out

    def test_one_that_cannot_be_run_does_not_stop_the_others(self, runner, cpu_bundle, monkeypatch):
        def fail(*_):
            raise RuntimeError("out of\nmemory")

        monkeypatch.setattr("yolo_prune.device.runtimes.onnx_runtime.OnnxSession.__call__", fail)
        code, out, err = runner(cpu_bundle, "check")
        assert (code, out.count(" yes\n")) == (1, 2)
        assert "not checked: slim.onnx: RuntimeError: out of memory\n" in out
        assert "out of memory" in err

    def test_runtimes_that_are_missing_are_told(self, runner, bundle, monkeypatch):
        without(monkeypatch, "ncnn", "openvino")
        code, out, _ = runner(bundle, "check")
        assert code == 0
        assert "not checked: slim_ncnn_model: package 'ncnn' is not installed" in out
        assert "requirements-cpu.txt" in out

    def test_no_runtime_at_all(self, runner, bundle, monkeypatch):
        without(monkeypatch, *BACKENDS)
        said = runner.refused(bundle, "check")
        assert all(f"'{name}'" in said for name in BACKENDS)
        assert "pip install -r" in said

    def test_library_that_does_not_start(self, runner, bundle, monkeypatch):
        def fail(_self):
            raise ImportError("libgomp.so.1: cannot open shared object file")

        monkeypatch.setattr("yolo_prune.device.runtimes.NcnnRuntime.version", fail)
        code, out, _ = runner(bundle, "check")
        assert code == 0
        assert "ncnn does not start: libgomp.so.1" in out


class TestBenchmark:
    def test_times_what_is_there(self, runner, cpu_bundle, desk, monkeypatch):
        without(monkeypatch, "openvino")
        words = ("benchmark", "runs=2", "warmup=0", "threads=1", "json=t.json")
        code, out, _ = runner(cpu_bundle, *words)
        assert code == 0
        assert "not timed: slim_openvino_model" in out
        found = json.loads((desk / "t.json").read_text())
        assert [entry["backend"] for entry in found["entries"]] == ["onnxruntime", "ncnn"]
        assert "already exists" in runner.refused(cpu_bundle, *words)

    WORDS = ("benchmark", "runs=2", "warmup=0", "threads=1")

    def test_an_engine_that_cannot_be_loaded_does_not_stop_the_others(self, runner, cpu_bundle, tmp_path, monkeypatch):
        """It was built by another TensorRT, say; of those that are timed there is a table, and the exit code tells."""
        (tmp_path / "built").mkdir()
        (tmp_path / "built" / "old.engine").write_bytes(b"")
        install(monkeypatch, "10.3.0")
        without(monkeypatch, "openvino", "ncnn")
        monkeypatch.setattr(
            "yolo_prune.device.runner_benchmark.peak_memory", lambda *_, **__: None
        )  # no stand-in there
        code, out, err = runner(cpu_bundle, *self.WORDS, f"out={tmp_path / 'built'}")
        assert code == 1
        assert re.search(r"slim.onnx +onnxruntime ", out)
        assert "not timed: old.engine: " in out
        assert "holds no plan" in out
        assert "old.engine" in err

    @pytest.mark.parametrize("content", [None, b"nonsense"])
    def test_a_damaged_or_missing_artefact_does_not_stop_the_others(self, runner, bundle, desk, content):
        file = bundle / "artefacts" / "slim.onnx"
        file.unlink() if content is None else file.write_bytes(content)
        code, out, err = runner(bundle, *self.WORDS, "json=t.json")
        assert code == 1
        assert f"not timed: slim.onnx: {'checksum of ' if content else ''}'artefacts/slim.onnx' is " in out
        assert "slim.onnx" in err
        entries = json.loads((desk / "t.json").read_text())["entries"]
        assert [entry["name"] for entry in entries] == ["slim_openvino_model", "slim_ncnn_model"]

    def test_one_that_fails_when_it_is_run_does_not_stop_the_others(self, runner, cpu_bundle, monkeypatch):
        def fail(*_):
            raise RuntimeError("out of\nmemory")

        monkeypatch.setattr("yolo_prune.device.runtimes.onnx_runtime.OnnxSession.__call__", fail)
        code, out, _ = runner(cpu_bundle, *self.WORDS)
        assert code == 1
        assert "not timed: slim.onnx: RuntimeError: out of memory\n" in out
        assert re.search(r"slim_ncnn_model +ncnn ", out)

    def test_one_that_kills_its_process_does_not_stop_the_others(self, runner, cpu_bundle, tmp_path, monkeypatch):
        """Here a Python that dies at the name of NCNN stands for a runtime that crashes."""
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\ncase "$*" in *ncnn_model*) kill -SEGV $$;; esac\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        code, out, _ = runner(cpu_bundle, *self.WORDS)
        assert code == 1
        assert re.search(r"not timed: slim_ncnn_model: .* died \(killed by signal 11\)", out)
        assert re.search(r"slim.onnx +onnxruntime ", out)

    def test_not_one_that_can_be_timed(self, runner, bundle, monkeypatch):
        without(monkeypatch, "openvino", "ncnn")
        (bundle / "artefacts" / "slim.onnx").write_bytes(b"nonsense")
        code, out, err = runner(bundle, *self.WORDS)
        assert code == 1
        assert out.count("not timed: ") == 3
        assert "median" not in out
        assert "slim.onnx" in err

    def test_bad_numbers(self, runner, cpu_bundle):
        assert "runs=0" in runner.refused(cpu_bundle, "benchmark", "runs=0")


class TestBuild:
    def test_other_targets_need_none(self, runner, cpu_bundle):
        assert "target 'cpu'" in runner.refused(cpu_bundle, "build")

    def test_without_tensorrt(self, runner, jetson_bundle, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.which", lambda _name: None)
        said = runner.refused(jetson_bundle, "build", f"out={tmp_path / 'out'}")
        assert "nvidia-jetpack" in said
        assert not (tmp_path / "out").exists()

    def test_bad_precision(self, runner, jetson_bundle):
        assert "fp32, fp16, int8" in runner.refused(jetson_bundle, "build", "precision=half")

    def test_existing_engine(self, runner, jetson_bundle, tmp_path):
        (tmp_path / "slim_fp16.engine").write_text("mine")
        words = ("build", f"out={tmp_path}", "precision=fp16")
        assert "already exists" in runner.refused(jetson_bundle, *words)

    @pytest.mark.parametrize(
        ("words", "name"),
        [
            ((), "slim_int8.engine"),
            (("precision=fp16", "dla=0"), "slim_fp16_dla0.engine"),
            (("precision=fp16", "sparse=true"), "slim_fp16_sparse.engine"),
        ],
    )
    def test_builds(self, runner, jetson_bundle, tmp_path, monkeypatch, words, name):
        """Two ways do not take one another's place; ranges are kept under the name of what they were measured on."""

        def written(*_):
            for _, calibrator in [call for call in trt.log if call[0] == "IBuilderConfig.int8_calibrator"]:
                while calibrator.get_batch(["images"]):
                    pass
                calibrator.write_calibration_cache(b"ranges")
            return b"ptrt plan"

        trt = install(monkeypatch, "10.3.0", Builder__num_DLA_cores=1, Builder__build_serialized_network=written)
        code, out, _ = runner(jetson_bundle, "build", f"out={tmp_path}", *words)
        assert code == 0
        assert f"{tmp_path / name}\nnow: python3 run.py check out='{tmp_path}'" in out
        assert EngineFile.read(tmp_path / name).plan == b"ptrt plan"
        kept = sorted(path.name.partition("_")[0] for path in tmp_path.glob("*.cache"))
        assert kept == (["timing.cache"] if words else ["calibration", "timing.cache"])

    def test_calibration_holds_one_image_at_a_time(self, runner, jetson_bundle, tmp_path, monkeypatch):
        reads: list[str] = []

        def written(*_):
            ((_, calibrator),) = (call for call in trt.log if call[0] == "IBuilderConfig.int8_calibrator")
            for number in range(3):
                assert len(reads) == number
                calibrator.get_batch(["images"])
            return b"ptrt plan"

        monkeypatch.setattr(
            "yolo_prune.device.runner_build.read_image", lambda file: reads.append(file.name) or read_image(file)
        )
        trt = install(monkeypatch, "10.3.0", Builder__build_serialized_network=written)
        assert runner(jetson_bundle, "build", f"out={tmp_path}")[0] == 0
        assert len(set(reads)) == 3

    def test_trtexec_alone_is_told_before_it_builds(self, runner, jetson_bundle, tmp_path, monkeypatch):
        monkeypatch.setattr("yolo_prune.device.runner_build.find_trtexec", lambda: tmp_path / "trtexec")
        monkeypatch.setattr("yolo_prune.device.runner_build.build_engine", lambda *_, **__: None)
        code, out, _ = runner(jetson_bundle, "build", f"out={tmp_path}", "precision=fp16")
        assert code == 0
        assert "sudo apt install python3-libnvinfer" in out

    def test_onnx_is_checked_without_an_engine(self, runner, jetson_bundle):
        code, out, _ = runner(jetson_bundle, "check")
        assert code == 0
        assert "slim.onnx" in out

    def test_no_runtime(self, runner, jetson_bundle, monkeypatch):
        without(monkeypatch, "onnxruntime")
        assert "run.py build" in runner.refused(jetson_bundle, "check")


class TestCommandLine:
    def test_says_what_it_holds(self, runner, cpu_bundle):
        code, out, _ = runner(cpu_bundle)
        assert code == 0
        assert "slim: task detect, 4 classes, 64 px" in out
        assert all(f"\n  {verb} " in out for verb in ("check", "build", "benchmark", "detect"))

    @pytest.mark.parametrize("verb", ["check", "build", "benchmark", "detect"])
    def test_help(self, runner, cpu_bundle, verb):
        code, out, _ = runner(cpu_bundle, verb, "--help")
        assert code == 0
        assert "\n  out " in out

    def test_unknown_command(self, runner, cpu_bundle):
        assert "unknown command 'chek'" in runner.refused(cpu_bundle, "chek")
