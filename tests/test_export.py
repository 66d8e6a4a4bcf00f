"""`export`: what stands there afterwards, what is refused, and what becomes of an artefact that disagrees."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import shutil

import cv2
import numpy as np
import pytest
import yaml
from checkpoint_files import save_as_host
from command_line import contents, write_yaml
from ultralytics import YOLO

from yolo_prune.device.detections import letterbox
from yolo_prune.device.images import synthetic_images
from yolo_prune.device.runtimes import runtime_for
from yolo_prune.errors import ConfigError, DataError
from yolo_prune.export import parity
from yolo_prune.export.accuracy import Accuracy
from yolo_prune.export.provenance import read_provenance
from yolo_prune.hosts.ultralytics.evaluation import image_files
from yolo_prune.pipeline import artefacts
from yolo_prune.pipeline.artefacts import calibration_inputs, sample_images

FORMATS = ("onnx", "ncnn", "openvino")


class TestArtefacts:
    def test_of_several_precisions_stand_side_by_side(self, command, slim, data, desk):
        """16 bit beside 32 bit; mAP is measured, boxes are matched, and both are written into the artefact."""
        words = (f"model={slim}", "out=å b", "imgsz=64", f"data={data}", "images=3", "threads=1")
        assert command("export", *words, "format=onnx").code == 0
        done = command("export", *words, "format=onnx,ncnn,openvino", "half=true", "json=half.json")
        assert done.code == 0
        names = {"slim_before.onnx", "slim_before_fp16.onnx", "slim_before_fp16_ncnn_model"}
        assert {path.name for path in (desk / "å b").iterdir()} == {*names, "slim_before_fp16_openvino_model"}
        written = json.loads((desk / "half.json").read_text())
        assert written["error"] == [None] * 3
        for name, found, accuracy in zip(written["artefacts"], written["parity"], written["accuracy"], strict=True):
            assert name in done.out
            assert (found["precision"], found["images"]) == ("fp16", 3)
            assert found["passed"]
            assert accuracy["passed"]
            assert (accuracy["images"], accuracy["limit"]) == (8, 0.005)
            told = read_provenance(desk / name)
            assert (told.precision, told.parity, told.accuracy) == ("fp16", found, accuracy)
            assert told.verified
        assert not list(desk.rglob(".*"))

    @pytest.mark.parametrize(("format_name", "suffix"), [("onnx", ".onnx"), ("openvino", "_openvino_model")])
    def test_of_several_images_or_sizes(self, format_name, suffix, command, slim, desk):
        """Three drawn images beside a batch of two; a dynamic artefact also takes another number of another size."""
        images = np.concatenate([letterbox(image, 96)[0] for image in synthetic_images(3, 96)])
        words = (f"model={slim}", f"format={format_name}", "batch=2")
        for out, more in (("fixed", ()), ("dynamic", ("dynamic=true",))):
            assert command("export", *words, f"out={out}", "imgsz=64", *more).code == 0
        for out, size, count, fixed in (("fixed", 64, 2, 2), ("dynamic", 96, 3, None)):
            path = desk / out / f"slim_before{suffix}"
            with runtime_for(path).load(path, imgsz_px=size, threads=1) as session:
                assert session.batch == fixed
                together = session(np.ascontiguousarray(images[:count, :, :size, :size]))[0]
            assert together.shape[0] == count
            assert read_provenance(path).verified

    def test_numbers_of_images_do_not_matter_to_a_session_of_ncnn(self, command, slim, desk):
        assert command("export", f"model={slim}", "format=ncnn", "out=a", "imgsz=64").code == 0
        path, images = desk / "a" / "slim_before_ncnn_model", synthetic_images(2, 64)
        inputs = [letterbox(image, 64)[0] for image in images]
        with runtime_for(path, full_precision=True).load(path, imgsz_px=64, threads=1) as session:
            both, first, second = (session(x)[0] for x in (np.concatenate(inputs), *inputs))
        assert np.array_equal(both, np.concatenate([first, second]))


class TestDisagreement:
    def test_is_kept_aside_with_its_figures_and_what_agrees_stays(self, command, dense, desk, monkeypatch):
        """Boxes of NCNN's artefact are off, and only they: the rest is exported all the same."""
        whole = artefacts.check_parity

        def check(reference, artefact, **options):
            report = whole(reference, artefact, **options)
            boxes = dataclasses.replace(report.agreement.boxes, max_abs=1e3)
            agreement = dataclasses.replace(report.agreement, boxes=boxes)
            return dataclasses.replace(report, agreement=agreement) if "ncnn" in artefact.name else report

        monkeypatch.setattr(artefacts, "check_parity", check)
        words = (f"model={dense}", "out=a", "imgsz=64", "format=ncnn,onnx", "json=a.json")
        done = command("export", *words)
        assert done.code == 1
        assert "artefact 'dense_ncnn_model' (ncnn) differs from PyTorch" in done.err
        assert [line.split()[-1] for line in done.out.splitlines()[-2:]] == ["NO", "yes"]
        names = {"dense_ncnn_model.failed", "dense_ncnn_model.failed.json", "dense.onnx"}
        assert {path.name for path in (desk / "a").iterdir()} == names
        figures = json.loads((desk / "a" / "dense_ncnn_model.failed.json").read_text())
        assert not figures["parity"]["passed"]
        assert figures["error"] in done.err
        assert not read_provenance(desk / "a" / "dense_ncnn_model.failed").verified
        assert json.loads((desk / "a.json").read_text())["parity"][0] == figures["parity"]
        before = contents(desk)
        again = command("export", *words[:-1])
        assert again.code == 2
        assert "dense_ncnn_model.failed' already exists" in again.err
        assert contents(desk) == before

    def test_of_values_that_are_not_finite(self, command, dense, desk, monkeypatch):
        monkeypatch.setattr(parity, "_predict", lambda _, inputs: [np.full((len(inputs), 8, 84), np.nan)])
        done = command("export", f"model={dense}", "out=a", "imgsz=64")
        assert done.code == 1
        assert "not finite" in done.err
        assert (desk / "a" / "dense.onnx.failed").is_file()

    @pytest.mark.parametrize(
        "error", [ConfigError("no such operator", expected="another runtime"), KeyboardInterrupt()]
    )
    def test_what_was_never_compared_does_not_stand(self, command, dense, desk, monkeypatch, error):
        """Its runtime refuses it, or the user stops the comparison: nothing is left that looks like a proven file."""

        def check(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(artefacts, "check_parity", check)
        before = contents(desk)
        with contextlib.suppress(KeyboardInterrupt):
            assert command("export", f"model={dense}", "out=a/b", "imgsz=64", "format=onnx,ncnn").code != 0
        assert contents(desk) == before

    def test_of_map_alone(self, command, dense, data, desk, monkeypatch):
        """Raw outputs and boxes agree, and on the whole split more is lost than allowed."""
        lost = Accuracy(split="val", images=8, pytorch=0.5, artefact=0.4, losses={"box": 0.1}, limit=0.005)
        monkeypatch.setattr(artefacts, "measure_accuracy", lambda *_, **__: lost)
        done = command("export", f"model={dense}", "out=a", "imgsz=64", f"data={data}", "images=2")
        assert done.code == 1
        assert "loses 0.1000 (box) mAP50-95 of the 0.5000 that PyTorch has" in done.err
        figures = json.loads((desk / "a" / "dense.onnx.failed.json").read_text())
        assert figures["parity"]["passed"]
        assert figures["accuracy"] == lost.to_json()
        assert not read_provenance(desk / "a" / "dense.onnx.failed").verified

    def test_of_8_bit_that_detects_nothing(self, command, tiny_data, tmp_path):
        """Nothing was shown, so nothing is claimed: the host's start values score far below what counts."""
        dense = save_as_host(YOLO("yolov8n.yaml", verbose=False).model, tmp_path / "blind.pt")
        words = (f"model={dense}", f"out={tmp_path / 'a'}", "imgsz=64", "int8=true", f"data={tiny_data}", "map=false")
        done = command("export", *words, "images=2", "calibration=2")
        assert done.code == 1
        assert "0 of 0 detections found" in done.err
        figures = json.loads((tmp_path / "a" / "blind_int8.onnx.failed.json").read_text())
        assert figures["parity"]["tolerance"] is None


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("format=coreml",), "unknown format 'coreml'"),
            (("format=",), "key=value"),
            (("format=onnx,onnx",), "each once"),
            (("format=engine",), "yolo-prune bundle"),
            (("half=true", "int8=true"), "both half=true and int8=true"),
            (("int8=true",), "int8=true without data="),
            (("format=ncnn", "batch=2"), "NCNN has no batch axis"),
            (("format=ncnn", "dynamic=true"), "NCNN has no batch axis"),
            (("batch=0",), "batch=0"),
            (("images=0",), "images=0"),
            (("int8=true", "calibration=0", "data=data.yaml"), "calibration=0"),
            (("imgsz=70",), "a multiple of the model's stride 32"),
            (("split=tets", "data=data.yaml"), "no split 'tets'"),
        ],
    )
    @pytest.mark.usefixtures("data")
    def test_settings(self, words, said, dense, refused):
        size = () if "imgsz=70" in words else ("imgsz=64",)
        assert said in refused("export", f"model={dense}", "out=a", *size, *words)

    @pytest.mark.parametrize(
        ("taken", "said"),
        [
            ("a", "cannot write 'a/dense.onnx'"),
            ("a/dense.onnx.failed.json", "'a/dense.onnx.failed.json' already exists"),
        ],
    )
    def test_a_place_that_is_taken_is_told_before_any_work(self, taken, said, dense, data, desk, refused, monkeypatch):
        """A file in the folder's place, or the figures of an earlier artefact: mAP is not even measured."""
        monkeypatch.setattr("yolo_prune.pipeline.export.evaluate", None)
        (desk / taken).parent.mkdir(exist_ok=True)
        (desk / taken).write_text("mine")
        assert said in refused("export", f"model={dense}", "out=a", "imgsz=64", f"data={data}")

    @pytest.mark.parametrize(("split", "words"), [("train", ("int8=true",)), ("val", ())])
    def test_an_image_that_cannot_be_read_is_named(self, split, words, dense, tiny_data, desk, refused):
        shutil.copytree(tiny_data.parent, desk / "shapes")
        file = sorted((desk / "shapes" / "images" / split).iterdir())[0]
        file.write_bytes(b"no image")
        more = (f"data={desk / 'shapes' / tiny_data.name}", "images=8", "map=false", *words)
        message = refused("export", f"model={dense}", "out=a", "imgsz=64", *more)
        assert f"{file.name}' is " in message

    def test_an_empty_calibration_set(self, dense, data, desk, refused):
        (desk / "nothing").mkdir()
        write_yaml(data, {**yaml.safe_load(data.read_text()), "train": str(desk / "nothing")})
        message = refused("export", f"model={dense}", "out=a", "imgsz=64", "int8=true", f"data={data}")
        assert "split 'train'" in message
        assert "has no image" in message

    @pytest.mark.parametrize(("format_name", "package"), [("openvino", "nncf"), ("onnx", "onnxslim"), ("ncnn", "pnnx")])
    def test_a_package_that_is_not_installed(self, format_name, package, dense, data, refused, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
        more = ("int8=true", f"data={data}") if package == "nncf" else ()
        message = refused("export", f"model={dense}", "out=a", "imgsz=64", f"format={format_name}", *more)
        assert f"package '{package}' is not installed" in message
        assert "pip install 'yolo-prune[" in message


class TestImages:
    def test_for_calibration_are_drawn_from_train_by_seed(self, tiny_data):
        one, again, other = (calibration_inputs(tiny_data, 5, 64, seed=seed) for seed in (0, 0, 1))
        train = [letterbox(cv2.imread(str(file)), 64)[0] for file in image_files(tiny_data, "train")]
        assert len(one) == 5
        assert all(image.shape == (1, 3, 64, 64) for image in one)
        assert all(any(np.array_equal(image, known) for known in train) for image in one)
        assert np.array_equal(one, again)
        assert not np.array_equal(one, other)
        assert len(calibration_inputs(tiny_data, 100, 64)) == len(train)

    def test_for_parity_are_the_first_ones(self, tiny_data):
        found = sample_images(tiny_data, "test", 2)
        files = image_files(tiny_data, "test")
        assert all(np.array_equal(a, cv2.imread(str(b))) for a, b in zip(found, files[:2], strict=True))
        with pytest.raises(DataError):
            sample_images(tiny_data, "absent", 2)
