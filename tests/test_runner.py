"""The runner of a bundle: check, detect, benchmark, build, and everything that can be wrong on a device."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys

import cv2
import numpy as np
import pytest
from bundles import IMGSZ_PX, NAME, manifest
from command_line import contents
from ultralytics import YOLO

from yolo_prune.device.findings import Finding
from yolo_prune.device.reference import count_found_again, overlap
from yolo_prune.device.sources import write_image

BACKENDS = ("onnxruntime", "ncnn", "openvino")
CONFIDENCE = 0.02


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
        assert contents(bundle) == before

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

    @pytest.mark.parametrize("text", [None, "", "{", '{"format": 2}', '{"format": 1}', "[]"])
    def test_unreadable_manifest(self, runner, bundle, text):
        if text is None:
            (bundle / "bundle.json").unlink()
        else:
            (bundle / "bundle.json").write_text(text)
        assert "bundle.json" in runner.refused(bundle, "check")

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


class TestDetect:
    @pytest.fixture(scope="class")
    def expected(self, cpu_bundle, slim_checkpoint):
        """What the host predicts for the reference images."""
        yolo, found = YOLO(slim_checkpoint), []
        for name in manifest(cpu_bundle)["reference"]["images"]:
            options = {"imgsz": IMGSZ_PX, "conf": CONFIDENCE, "rect": False, "verbose": False}
            found.append(yolo.predict(cv2.imread(str(cpu_bundle / name)), **options)[0].boxes)
        return found

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_as_the_host_predicts(self, runner, cpu_bundle, expected, backend):
        lines = runner.lines(
            cpu_bundle, f"source={cpu_bundle / 'reference'}", f"backend={backend}", f"conf={CONFIDENCE}"
        )
        assert sum(map(len, expected)) > 0
        for line, boxes in zip(lines, expected, strict=True):
            assert [one["class"] for one in line["detections"]] == boxes.cls.int().tolist()
            np.testing.assert_allclose([one["box"] for one in line["detections"]], boxes.xyxy.numpy(), atol=1)
            np.testing.assert_allclose([one["score"] for one in line["detections"]], boxes.conf.numpy(), atol=1e-3)

    def test_one_image_from_elsewhere(self, runner, cpu_bundle, desk):
        write_image(desk / "mein Foto ä.jpg", np.full((50, 90, 3), 99, np.uint8))
        (line,) = runner.lines(cpu_bundle, "source=mein Foto ä.jpg")
        assert (line["source"], line["width"], line["height"]) == ("mein Foto ä.jpg", 90, 50)
        assert line["artefact"] == "slim_openvino_model"  # the preferred one
        assert set(line["ms"]) == {"letterbox", "forward", "boxes"}

    def test_folder_with_unreadable_images(self, runner, cpu_bundle, desk):
        for name in ("c.png", "a.JPG"):
            write_image(desk / "in" / name.lower(), np.zeros((40, 40, 3), np.uint8))
        (desk / "in" / "b.jpg").write_bytes(b"nonsense")
        (desk / "in" / "d.png").write_bytes(b"")
        (desk / "in" / "notes.txt").write_text("no image")
        code, out, err = runner(cpu_bundle, "detect", "source=in")
        assert code == 0
        assert [json.loads(line)["source"] for line in out.splitlines()] == ["in/a.jpg", "in/c.png"]
        assert err.count("warning: skipped") == 2

    @pytest.mark.parametrize("content", [b"", b"nonsense"])
    def test_unreadable_alone(self, runner, cpu_bundle, desk, content):
        (desk / "a.jpg").write_bytes(content)
        assert "image 'a.jpg' is" in runner.refused(cpu_bundle, "detect", "source=a.jpg")
        assert "none of 1 images" in runner.refused(cpu_bundle, "detect", "source=.")

    def test_video(self, runner, cpu_bundle, desk):
        writer = cv2.VideoWriter("v.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
        for level in (0, 100, 200):
            writer.write(np.full((48, 64, 3), level, np.uint8))
        writer.release()
        lines = runner.lines(cpu_bundle, "source=v.avi", "save=drawn")
        assert [line["frame"] for line in lines] == [0, 1, 2]
        assert sorted(file.name for file in (desk / "drawn").iterdir()) == [f"v_00000{at}.jpg" for at in range(3)]
        assert len(runner.lines(cpu_bundle, "source=v.avi", "frames=2")) == 2

    def test_video_that_is_none(self, runner, cpu_bundle, desk):
        (desk / "v.mp4").write_bytes(b"nonsense")
        assert "video 'v.mp4' cannot be read" in runner.refused(cpu_bundle, "detect", "source=v.mp4")

    def test_saved_with_boxes(self, runner, cpu_bundle, desk):
        source = cpu_bundle / "reference" / "0000.png"
        assert runner.lines(cpu_bundle, f"source={source}", "save=aus gabe", f"conf={CONFIDENCE}")[0]["detections"]
        drawn = cv2.imread(str(desk / "aus gabe" / "0000.png"))
        assert (drawn != cv2.imread(str(source))).any()
        said = runner.refused(cpu_bundle, "detect", f"source={source}", "save=aus gabe")
        assert "already exists" in said

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["source=camera:97"], "camera 97 does not answer"),
            (["source=camera:x"], "source 'camera:x'"),
            (["source=absent"], "no source 'absent'"),
            ([], "'source=' is required"),
            (["source=a", "backend=tflite"], "one of: auto, openvino, onnxruntime, ncnn"),
            (["source=a", "backend=tensorrt"], "run.py build"),
            (["source=a", "conf=2"], "conf=2"),
            (["source=a", "conf=x"], "conf=x"),
            (["source=a", "threads=0"], "threads=0"),
            (["source=a", "frames=-1"], "frames=-1"),
            (["source=a", "show=maybe"], "true or false"),
            (["source=a", "confidence=1"], "'conf'?"),
            (["source=a", "source=b"], "given twice"),
            (["a.jpg"], "argument 'a.jpg'"),
        ],
    )
    def test_bad_input(self, runner, cpu_bundle, words, said):
        assert said in runner.refused(cpu_bundle, "detect", *words)

    def test_no_window(self, runner, cpu_bundle, monkeypatch):
        def fail(*_):
            raise cv2.error("not implemented")

        monkeypatch.setattr(cv2, "imshow", fail)
        words = (f"source={cpu_bundle / 'reference'}", "show=true")
        assert "cannot open a window" in runner.refused(cpu_bundle, "detect", *words)

    def test_damaged_artefact(self, runner, bundle):
        (bundle / "artefacts" / "slim.onnx").write_bytes(b"nonsense")
        assert "checksum of 'artefacts/slim.onnx'" in runner.refused(bundle, "detect", f"source={bundle / 'reference'}")


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

    def test_onnx_is_checked_without_an_engine(self, runner, jetson_bundle):
        code, out, _ = runner(jetson_bundle, "check")
        assert code == 0
        assert "slim.onnx" in out


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


class TestFoundAgain:
    BOX = (0.0, 0.0, 10.0, 10.0)

    def reference(self, score=0.9, box=BOX):
        return [{"class": 0, "score": score, "box": list(box)}]

    def found(self, box=BOX, class_id=0):
        return [Finding(class_id=class_id, name="a", score=0.5, box=box)]

    @pytest.mark.parametrize(
        ("reference", "found", "expected"),
        [
            ({}, {}, (1, 1)),
            ({}, {"box": (0.0, 0.0, 10.0, 6.0)}, (1, 1)),
            ({}, {"box": (0.0, 0.0, 10.0, 4.0)}, (1, 0)),
            ({}, {"class_id": 1}, (1, 0)),
            ({"score": 0.3}, {}, (0, 0)),  # too near the threshold to be asked for
        ],
    )
    def test_by_hand(self, reference, found, expected):
        assert count_found_again(self.reference(**reference), self.found(**found), 0.25) == expected

    def test_each_only_once(self):
        assert count_found_again(self.reference() * 2, self.found(), 0.25) == (2, 1)

    def test_overlap(self):
        assert overlap((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(1 / 3)
        assert overlap((0, 0, 1, 1), (1, 1, 2, 2)) == overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0
