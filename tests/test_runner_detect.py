"""`run.py detect`: sources, what is found in them, what is drawn, and everything that can be wrong."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest
from bundles import IMGSZ_PX, NAME, assert_same, manifest
from ultralytics import YOLO

from yolo_prune.device import sources
from yolo_prune.device.sources import write_image


class FewFrames:
    """A camera that is unplugged."""

    def __init__(self, frames: list[np.ndarray]) -> None:
        self.frames = frames

    def read(self) -> np.ndarray | None:
        return self.frames.pop() if self.frames else None

    def close(self) -> None:
        pass


class TestDetect:
    @pytest.fixture(scope="class")
    def expected(self, cpu_bundle, finding_checkpoint):
        """What the host predicts for the reference images."""
        yolo, found = YOLO(finding_checkpoint), []
        for name in manifest(cpu_bundle)["reference"]["images"]:
            options = {"imgsz": IMGSZ_PX, "rect": False, "verbose": False}
            found.append(yolo.predict(cv2.imread(str(cpu_bundle / name)), **options)[0].boxes)
        return found

    @pytest.mark.parametrize("backend", ["onnxruntime", "ncnn", "openvino"])
    def test_as_the_host_predicts(self, runner, cpu_bundle, expected, backend):
        """As deployed: OpenVINO computes in bfloat16 by default where the CPU can."""
        lines = runner.lines(cpu_bundle, f"source={cpu_bundle / 'reference'}", f"backend={backend}")
        widths = [float(width) for boxes in expected for width in boxes.xywh[:, 2]]
        assert min(widths) < max(widths) < IMGSZ_PX
        for line, boxes in zip(lines, expected, strict=True):
            assert_same(line["detections"], boxes)

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
        assert runner.lines(cpu_bundle, f"source={source}", "save=aus gabe")[0]["detections"]
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
            (["source=a", "sorce=b"], "'source'?"),
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

    @pytest.mark.parametrize(("source", "wait_ms"), [("reference", 0), ("video", 1)])
    def test_a_still_image_stays_until_a_key_is_pressed(self, runner, cpu_bundle, monkeypatch, desk, source, wait_ms):
        waited = []
        monkeypatch.setattr(cv2, "imshow", lambda *_: None)
        monkeypatch.setattr(cv2, "waitKey", lambda milliseconds: waited.append(milliseconds) or ord("q"))
        if source == "video":
            writer = cv2.VideoWriter(str(desk / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
            for _ in range(3):
                writer.write(np.zeros((64, 64, 3), np.uint8))
            writer.release()
        path = desk / "a.avi" if source == "video" else cpu_bundle / "reference"
        lines = runner.lines(cpu_bundle, f"source={path}", "show=true")
        assert (len(lines), waited) == (1, [wait_ms])  # q ended it

    def test_a_camera_that_stops_answering(self, runner, cpu_bundle, monkeypatch):
        frames = [np.zeros((64, 64, 3), np.uint8)] * 2
        monkeypatch.setattr(sources, "_Capture", lambda _: FewFrames(list(frames)))
        code, out, err = runner(cpu_bundle, "detect", "source=camera:0")
        assert (code, len(out.splitlines())) == (2, 2)
        assert "camera 0 stopped answering after 2 frames" in err
        assert len(runner.lines(cpu_bundle, "source=camera:0", "frames=2")) == 2

    def test_one_artefact_by_its_name(self, runner, cpu_bundle):
        (line, *_) = runner.lines(cpu_bundle, f"source={cpu_bundle / 'reference'}", "artefact=slim.onnx")
        assert line["artefact"] == "slim.onnx"
        said = runner.refused(cpu_bundle, "detect", f"source={cpu_bundle / 'reference'}", "artefact=slim")
        assert "slim_openvino_model, slim.onnx, slim_ncnn_model" in said

    def test_damaged_artefact(self, runner, cpu_bundle, tmp_path):
        bundle = shutil.copytree(cpu_bundle, tmp_path / NAME)
        (bundle / "artefacts" / "slim.onnx").write_bytes(b"nonsense")
        assert "checksum of 'artefacts/slim.onnx'" in runner.refused(bundle, "detect", f"source={bundle / 'reference'}")
