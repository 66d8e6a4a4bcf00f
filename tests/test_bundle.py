"""`bundle`: what the folder holds, that it says so, and what is refused before anything is written."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path

import bundles
import cv2
import numpy as np
import pytest
import yaml
from bundles import IMGSZ_PX, manifest
from checkpoint_files import save_as_host
from command_line import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from models import lively

from yolo_prune.device.bundle import Bundle
from yolo_prune.device.detections import letterbox
from yolo_prune.device.runtimes.base import ArtefactFacts
from yolo_prune.device.sources import read_image, write_image
from yolo_prune.errors import ConfigError, ExportError, ParityError
from yolo_prune.export.parity import TOLERANCES
from yolo_prune.export.provenance import read_provenance
from yolo_prune.hosts.ultralytics.checkpoints import task_of
from yolo_prune.hosts.ultralytics.evaluation import image_files
from yolo_prune.pipeline.bundle import BundleConfig, _fitting, fitted


class TestFolder:
    def test_lists_every_file_with_its_checksum(self, cpu_bundle, jetson_bundle):
        for folder in (cpu_bundle, jetson_bundle):
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            del files["bundle.json"]
            assert manifest(folder)["files"] == {
                name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
            }

    def test_cpu(self, cpu_bundle):
        found = manifest(cpu_bundle)
        assert [one["backend"] for one in found["artefacts"]] == ["openvino", "onnxruntime", "ncnn"]
        assert all(one["max_rel"] <= TOLERANCES["fp32"] for one in found["artefacts"])
        assert (found["engine"], found["calibration"], found["target"]) == (None, [], "cpu")
        assert not list((cpu_bundle / "artefacts").rglob("*.py"))
        assert {"openvino", "onnxruntime", "ncnn", "numpy"} <= set(
            (cpu_bundle / "requirements-cpu.txt").read_text().split()
        )

    def test_jetson(self, jetson_bundle):
        found = manifest(jetson_bundle)
        assert [one["path"] for one in found["artefacts"]] == ["artefacts/slim.onnx"]
        assert (found["engine"], len(found["calibration"])) == ("int8", 3)
        assert all((jetson_bundle / name).is_file() for name in found["calibration"])
        assert "tensorrt" not in (jetson_bundle / "requirements-jetson.txt").read_text()  # JetPack brings it

    def test_says_what_the_network_is(self, cpu_bundle, finding_checkpoint):
        found = manifest(cpu_bundle)
        network, provenance = found["network"], found["provenance"]
        assert (network["name"], network["task"], network["imgsz_px"]) == ("slim", "detect", IMGSZ_PX)
        assert (len(network["classes"]), network["end_to_end"], network["extras"]) == (4, False, {})
        assert provenance["checkpoint_sha256"] == hashlib.sha256(finding_checkpoint.read_bytes()).hexdigest()
        assert len(provenance["lineage"]) == 1
        assert provenance["choice"]["target_macs"] == 0.5

    def test_every_artefact_says_where_it_comes_from(self, cpu_bundle, jetson_bundle):
        for folder in (cpu_bundle, jetson_bundle):
            found = manifest(folder)
            for one in found["artefacts"]:
                told = read_provenance(folder / one["path"])
                assert told.verified
                assert told.precision == one["precision"]
                assert told.macs == found["provenance"]["macs"]

    def test_readme_is_for_the_target(self, cpu_bundle, jetson_bundle):
        texts = {folder: (folder / "README.md").read_text(encoding="utf-8") for folder in (cpu_bundle, jetson_bundle)}
        assert "JetPack 6" in texts[jetson_bundle]
        assert "JetPack" not in texts[cpu_bundle]
        assert all("{{" not in text and "{%" not in text for text in texts.values())
        assert all("run.py check" in text for text in texts.values())
        assert "GNU AFFERO" in (cpu_bundle / "LICENSE").read_text(encoding="utf-8")

    def test_manifest_round_trip(self, cpu_bundle):
        found = Bundle.read(cpu_bundle)
        assert json.loads(json.dumps(found.to_json())) == manifest(cpu_bundle)

    def test_metadata_needs_no_reader_of_yaml(self, cpu_bundle, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)
        for name in ("slim_ncnn_model", "slim_openvino_model"):
            assert ArtefactFacts.of_folder(cpu_bundle / "artefacts" / name).imgsz_px == (IMGSZ_PX, IMGSZ_PX)

    @pytest.mark.parametrize(
        "text", ["", "3", '"imgsz"', "[]", '["imgsz"]', "{", '{"imgsz": [Infinity, 64]}', '{"batch": Infinity}', "\xff"]
    )
    def test_damaged_metadata_are_told(self, tmp_path, text):
        (tmp_path / "metadata.yaml").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match="cannot be loaded"):
            ArtefactFacts.of_folder(tmp_path)

    def test_runner_imports_nothing_but_what_is_there(self, cpu_bundle):
        """Read, not run: what a function imports when it is called counts too; what only a type checker reads does not.

        `tensorrt` is imported where it is called, behind the question whether it is there.
        """
        allowed = {"yolo_prune", "numpy", "cv2", "scipy", "tensorrt", "__future__"} | set(sys.stdlib_module_names)
        for file in [cpu_bundle / "run.py", *(cpu_bundle / "yolo_prune").rglob("*.py")]:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _for_types(node.test)]
            unread = {id(inner) for node in guarded for statement in node.body for inner in ast.walk(statement)}
            for node in (node for node in ast.walk(tree) if id(node) not in unread):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert {name.partition(".")[0] for name in names} <= allowed, file
                for name in names:
                    if name.startswith("yolo_prune."):
                        assert name.split(".")[1] in ("device", "errors", "files"), file


def _for_types(test):
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


class TestReference:
    def test_images_are_those_of_the_split_made_to_fit(self, cpu_bundle, tiny_data):
        found = [read_image(cpu_bundle / name) for name in manifest(cpu_bundle)["reference"]["images"]]
        expected = [fitted(cv2.imread(str(file)), IMGSZ_PX) for file in image_files(tiny_data, "val")[:2]]
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))

    @given(height=st.integers(1, 300), width=st.integers(1, 300), imgsz_px=st.sampled_from([32, 96]))
    @settings(max_examples=80, deadline=None)
    def test_no_device_has_to_resize_them(self, height, width, imgsz_px):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        once, _ = letterbox(image, imgsz_px)
        again, placement = letterbox(fitted(image, imgsz_px), imgsz_px)
        assert (placement.scale_x, placement.scale_y) == (1, 1)
        assert np.array_equal(once, again)

    def test_outputs_are_those_of_pytorch(self, cpu_bundle, finding_checkpoint):
        import torch
        from ultralytics import YOLO

        images = [read_image(cpu_bundle / name) for name in manifest(cpu_bundle)["reference"]["images"]]
        batch = np.concatenate([letterbox(image, IMGSZ_PX)[0] for image in images])
        with torch.no_grad():
            expected = YOLO(finding_checkpoint).model.float().eval()(torch.from_numpy(batch))[0].numpy()
        with np.load(cpu_bundle / "reference" / "outputs.npz") as stored:
            assert stored.files == ["output0"]
            np.testing.assert_allclose(stored["output0"], expected, atol=1e-3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["target=jetsn"], "'jetson'?"),
            (["target=pi", "half=true", "int8=true"], "both half=true and int8=true"),
            (["target=pi", "int8=true"], "target=jetson and data="),
            (["target=jetson", "int8=true"], "data=not set"),
            (["target=pi", "images=0"], "images=0"),
            (["target=pi", "imgsz=70"], "imgsz=70"),
            (["target=pi", "data=absent.yaml"], "absent.yaml"),
        ],
    )
    def test_bad_input(self, refused, slim, words, said):
        assert said in refused("bundle", f"model={slim}", "out=bundle", *words)

    def test_unknown_split(self, refused, slim, data):
        words = ("bundle", f"model={slim}", "out=bundle", "target=pi", f"data={data}", "split=tset")
        assert "no split 'tset'" in refused(*words)

    def test_existing_folder(self, refused, slim, desk):
        (desk / "bundle").mkdir()
        assert "already exists" in refused("bundle", f"model={slim}", "out=bundle", "target=pi", "imgsz=64")

    def test_unreadable_images(self, refused, slim, desk):
        (desk / "images").mkdir()
        (desk / "images" / "a.jpg").write_bytes(b"nonsense")
        (desk / "data.yaml").write_text(yaml.safe_dump({"val": "images", "train": "images", "names": {0: "a"}}))
        words = ("bundle", f"model={slim}", "out=bundle", "target=pi", "imgsz=64", "data=data.yaml")
        said = refused(*words)
        assert "none of the 1 images" in said
        assert "a.jpg' is damaged" in said

    def test_an_image_that_cannot_be_read_is_named(self, desk, capsys):
        (desk / "a.jpg").write_bytes(b"nonsense")
        write_image(desk / "b.png", np.zeros((8, 8, 3), np.uint8))
        config = BundleConfig(model="m", target="pi", out="o", data="d", imgsz=64)
        assert len(_fitting([desk / "a.jpg", desk / "b.png"], config, "val")) == 1
        assert "warning: skipped: image" in capsys.readouterr().err

    def test_a_part_that_the_manifest_does_not_know(self, cpu_bundle):
        with pytest.raises(ConfigError, match="'artefacts/other' has no checksum"):
            Bundle.read(cpu_bundle).require_intact("artefacts/other")

    @pytest.mark.parametrize("error", [ParityError("no"), ExportError("no")])
    def test_nothing_is_left_of_a_bundle_that_fails(self, command, slim, desk, monkeypatch, error):
        def fail(*_args, **_kwargs):
            raise error

        before = contents(desk)
        monkeypatch.setattr("yolo_prune.pipeline.bundle.check_parity", fail)
        assert command("bundle", f"model={slim}", "out=deep/bundle", "target=jetson", "imgsz=64").code == 1
        assert contents(desk) == before


def test_halved_weights(slim_checkpoint, tmp_path):
    """The artefacts are smaller, and judged by the tolerance of their precision; drawn images do without data."""
    folder = bundles.make(slim_checkpoint, tmp_path / "half", "pi", half=True)
    found = manifest(folder)
    assert {one["precision"] for one in found["artefacts"]} == {"fp16"}
    assert found["reference"]["images"] == ["reference/0000.png", "reference/0001.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(f"yolov8n-{task}", marks=pytest.mark.exhaustive) for task in ("seg", "pose")),
        "yolov8n-obb",
        "yolo26n",
    ],
)
def test_every_task_and_twin_heads(runner, tmp_path, name):
    model = lively(name)
    model.task = task_of(model)
    checkpoint = save_as_host(model, tmp_path / "dense.pt")
    folder = bundles.make(checkpoint, tmp_path / "bundle", "jetson")
    found = manifest(folder)["network"]
    assert (found["task"], bool(found["extras"])) == (model.task, model.task != "detect")
    code, out, _ = runner(folder, "check")
    assert code == 0
    assert " yes\n" in out


def test_command_line(command, slim_checkpoint, tmp_path):
    words = (f"model={slim_checkpoint}", "target=jetson", f"out={tmp_path / 'j'}", "imgsz=64", "images=1", "half=true")
    outcome = command("bundle", *words, f"json={tmp_path / 'j.json'}")
    assert outcome.code == 0
    assert "run.py check" in outcome.out
    found = json.loads(Path(tmp_path / "j.json").read_text())
    assert (found["engine"], found["parity"][0]["passed"]) == ("fp16", True)
