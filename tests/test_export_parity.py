"""Export through the host, and agreement of the artefacts with PyTorch."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from yolo_prune.device.agreement import Agreement, Difference, compare_anchors, compare_detections
from yolo_prune.device.images import synthetic_images, to_input
from yolo_prune.device.runtimes import NcnnRuntime, OnnxRuntime, OpenVinoRuntime
from yolo_prune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    MissingDependencyError,
    OutputError,
    ParityError,
)
from yolo_prune.export.parity import TOLERANCES, ParityReport, check_parity
from yolo_prune.export.pytorch_runtime import PyTorchRuntime
from yolo_prune.export.runtimes import runtime_for
from yolo_prune.hosts.ultralytics.export import export_model
from yolo_prune.hosts.ultralytics.inference import load_for_inference

IMGSZ_PX = 64
ARTEFACTS = {"onnx_file": "onnxruntime", "ncnn_folder": "ncnn", "openvino_folder": "openvino"}
"""Backend by fixture."""


def save_untrained(name: str, path: Path) -> Path:
    """Save a model with random weights whose batch norms know their inputs: a fresh one hardly sees the image."""
    from ultralytics import YOLO

    torch.manual_seed(0)
    host = YOLO(f"{name}.yaml")
    for module in host.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    batch = np.concatenate([to_input(image, 2 * IMGSZ_PX) for image in synthetic_images(4, 2 * IMGSZ_PX, seed=7)])
    host.model.train()
    with torch.no_grad():
        host.model(torch.from_numpy(batch))
    host.model.eval()
    host.save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_untrained("yolov8n", tmp_path_factory.mktemp("v8") / "v8.pt")


@pytest.fixture(scope="module")
def onnx_file(checkpoint):
    return export_model(checkpoint, format="onnx", imgsz_px=IMGSZ_PX, out=checkpoint.parent / "v8.onnx")


@pytest.fixture(scope="module")
def ncnn_folder(checkpoint):
    return export_model(checkpoint, format="ncnn", imgsz_px=IMGSZ_PX, out=checkpoint.parent / "v8.pt.ncnn")


@pytest.fixture(scope="module")
def openvino_folder(checkpoint):
    return export_model(checkpoint, format="openvino", imgsz_px=IMGSZ_PX, out=checkpoint.parent / "v8_openvino")


@pytest.fixture(scope="module")
def twin_checkpoint(tmp_path_factory):
    return save_untrained("yolo26n", tmp_path_factory.mktemp("v26") / "v26.pt")


class TestExport:
    def test_nothing_but_the_artefacts_is_left(self, checkpoint, onnx_file, ncnn_folder, openvino_folder):
        assert set(checkpoint.parent.iterdir()) == {checkpoint, onnx_file, ncnn_folder, openvino_folder}
        assert {"model.ncnn.param", "model.ncnn.bin", "metadata.yaml"} <= {p.name for p in ncnn_folder.iterdir()}

    @pytest.mark.parametrize("kind", ["onnx", "ncnn", "openvino"])
    def test_existing_output_is_refused(self, checkpoint, tmp_path, kind):
        out = tmp_path / "taken"
        out.write_text("mine")
        with pytest.raises(OutputError):
            export_model(checkpoint, format=kind, imgsz_px=IMGSZ_PX, out=out)
        assert out.read_text() == "mine"

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"imgsz_px": 70}, ConfigError),
            ({"imgsz_px": 0}, ConfigError),
            ({"format": "coreml"}, ConfigError),
            ({"end_to_end": True}, ConfigError),
            ({"checkpoint": Path("absent.pt")}, CheckpointError),
        ],
    )
    def test_bad_requests_leave_nothing(self, checkpoint, tmp_path, change, error):
        arguments = {"checkpoint": checkpoint, "format": "onnx", "imgsz_px": IMGSZ_PX, "out": tmp_path / "o.onnx"}
        with pytest.raises(error):
            export_model(**{**arguments, **change})
        assert not list(tmp_path.iterdir())

    def test_not_a_checkpoint(self, tmp_path):
        broken = tmp_path / "broken.pt"
        broken.write_bytes(b"nonsense")
        with pytest.raises(CheckpointError, match=r"broken\.pt"):
            export_model(broken, format="onnx", imgsz_px=IMGSZ_PX, out=tmp_path / "o.onnx")

    def test_failure_of_the_host(self, checkpoint, tmp_path, monkeypatch):
        def fail(*_args, **_kwargs):
            raise AssertionError("0.050 MB output model too small")

        monkeypatch.setattr("ultralytics.engine.exporter.Exporter.export_onnx", fail)
        with pytest.raises(ExportError, match="too small"):
            export_model(checkpoint, format="onnx", imgsz_px=IMGSZ_PX, out=tmp_path / "o.onnx")
        assert not list(tmp_path.iterdir())

    def test_missing_package(self, checkpoint, tmp_path, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pnnx" else find(name, *a))
        with pytest.raises(MissingDependencyError, match="pnnx"):
            export_model(checkpoint, format="ncnn", imgsz_px=IMGSZ_PX, out=tmp_path / "o")


class TestRuntimes:
    def test_chosen_by_artefact(self, checkpoint, onnx_file, ncnn_folder, openvino_folder, tmp_path):
        assert isinstance(runtime_for(checkpoint), PyTorchRuntime)
        assert isinstance(runtime_for(onnx_file), OnnxRuntime)
        assert isinstance(runtime_for(ncnn_folder), NcnnRuntime)
        assert isinstance(runtime_for(openvino_folder), OpenVinoRuntime)
        for unknown in (tmp_path, tmp_path / "absent.onnx"):
            with pytest.raises(ConfigError):
                runtime_for(unknown)

    def test_all_answer_with_the_same_shape(self, checkpoint, onnx_file, ncnn_folder, openvino_folder):
        image = to_input(synthetic_images(1, IMGSZ_PX)[0], IMGSZ_PX)
        for artefact in (checkpoint, onnx_file, ncnn_folder, openvino_folder):
            with runtime_for(artefact).load(artefact, imgsz_px=IMGSZ_PX, threads=1) as session:
                output = session(image)[0]
            assert output.shape == (1, 84, 84)
            assert output.dtype == np.float32

    def test_other_input_size_is_refused(self, onnx_file, ncnn_folder, openvino_folder):
        for artefact in (onnx_file, ncnn_folder, openvino_folder):
            with (
                pytest.raises(ConfigError, match="96"),
                runtime_for(artefact).load(artefact, imgsz_px=96, threads=1),
            ):
                pass

    def test_damaged_artefacts_are_refused(self, onnx_file, ncnn_folder, openvino_folder, tmp_path):
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(onnx_file.read_bytes()[:1000])
        folder = shutil.copytree(ncnn_folder, tmp_path / "ncnn")
        (folder / "model.ncnn.bin").write_bytes(b"")
        other = shutil.copytree(openvino_folder, tmp_path / "openvino")
        next(other.glob("*.bin")).write_bytes(b"")
        for artefact in (broken, folder, other):
            with pytest.raises(ConfigError), runtime_for(artefact).load(artefact, imgsz_px=IMGSZ_PX, threads=1):
                pass

    @pytest.mark.parametrize(("package", "fixture"), [(runtime, fixture) for fixture, runtime in ARTEFACTS.items()])
    def test_missing_package(self, package, fixture, request, monkeypatch):
        artefact = request.getfixturevalue(fixture)
        monkeypatch.setitem(sys.modules, package, None)
        with (
            pytest.raises(MissingDependencyError, match=package),
            runtime_for(artefact).load(artefact, imgsz_px=IMGSZ_PX, threads=1),
        ):
            pass

    def test_torch_threads_are_restored(self, checkpoint):
        before = torch.get_num_threads()
        with PyTorchRuntime().load(checkpoint, imgsz_px=IMGSZ_PX, threads=before + 1):
            assert torch.get_num_threads() == before + 1
        assert torch.get_num_threads() == before

    def test_head_that_is_not_there(self, checkpoint):
        with pytest.raises(CheckpointError, match="one-to-one"):
            load_for_inference(checkpoint, end_to_end=True)


class TestParity:
    def test_of_a_checkpoint_with_itself_is_exact(self, checkpoint):
        report = check_parity(checkpoint, checkpoint, imgsz_px=IMGSZ_PX).require()
        assert report.max_abs == report.max_rel == 0

    @pytest.mark.parametrize("kind", list(ARTEFACTS))
    def test_of_exports(self, checkpoint, kind, request):
        report = check_parity(checkpoint, request.getfixturevalue(kind), imgsz_px=IMGSZ_PX).require()
        assert 0 < report.max_rel <= TOLERANCES["fp32"]
        assert ParityReport.from_json(json.loads(json.dumps(report.to_json()))) == report

    def test_of_a_perturbed_graph_fails(self, checkpoint, onnx_file, tmp_path):
        import onnx
        from onnx import numpy_helper

        graph = onnx.load(onnx_file)
        weight = next(item for item in graph.graph.initializer if item.name.endswith("model.4.cv2.conv.weight"))
        values = numpy_helper.to_array(weight).copy()
        values[0] = 0  # one filter of one layer
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(graph, tmp_path / "perturbed.onnx")
        report = check_parity(checkpoint, tmp_path / "perturbed.onnx", imgsz_px=IMGSZ_PX)
        assert not report.passed
        with pytest.raises(ParityError, match=r"perturbed\.onnx"):
            report.require()

    def test_of_another_model_fails(self, onnx_file, twin_checkpoint):
        assert not check_parity(twin_checkpoint, onnx_file, imgsz_px=IMGSZ_PX).passed

    def test_of_half_precision_has_its_own_tolerance(self, checkpoint, tmp_path):
        half = export_model(checkpoint, format="ncnn", imgsz_px=IMGSZ_PX, out=tmp_path / "half", half=True)
        report = check_parity(checkpoint, half, imgsz_px=IMGSZ_PX)
        assert report.precision == "fp16"
        assert report.tolerance == TOLERANCES["fp16"]
        assert report.max_rel > TOLERANCES["fp32"]

    def test_of_either_head(self, twin_checkpoint, tmp_path):
        for end_to_end, shape in ((False, (1, 84, 84)), (True, (1, 84, 6))):
            out = tmp_path / f"{end_to_end}.onnx"
            export_model(twin_checkpoint, format="onnx", imgsz_px=IMGSZ_PX, out=out, end_to_end=end_to_end)
            image = to_input(synthetic_images(1, IMGSZ_PX)[0], IMGSZ_PX)
            with OnnxRuntime().load(out, imgsz_px=IMGSZ_PX, threads=1) as session:
                assert session(image)[0].shape == shape
            check_parity(twin_checkpoint, out, imgsz_px=IMGSZ_PX).require()

    def test_needs_images(self, checkpoint):
        for images in ([], [np.zeros((3, 8, 8), np.uint8)], [np.zeros((8, 8, 3), np.float32)]):
            with pytest.raises(DataError):
                check_parity(checkpoint, checkpoint, imgsz_px=IMGSZ_PX, images=images)

    @pytest.mark.data
    @pytest.mark.parametrize("kind", ["onnx", "ncnn"])
    def test_of_trained_weights_on_real_images(self, real_data, tmp_path, kind):
        weights = real_data / "weights" / "yolov8n_coco.pt"
        images = [cv2.imread(str(path)) for path in sorted((real_data / "bccd" / "images" / "val").glob("*.jpg"))[:4]]
        out = export_model(
            weights, format=kind, imgsz_px=320, out=tmp_path / "artefact" if kind == "ncnn" else tmp_path / "a.onnx"
        )
        report = check_parity(weights, out, imgsz_px=320, images=images or None).require()
        assert report.max_rel < 1e-4


def detections(seed: int = 0, count: int = 20) -> np.ndarray:
    """Draw (1, count, 6) detections in order of score."""
    random = np.random.default_rng(seed)
    boxes = random.uniform(0, 100, (count, 4))
    scores = np.sort(random.uniform(0.1, 0.9, count))[::-1]
    return np.column_stack([boxes, scores, random.integers(0, 3, count)])[None].astype(np.float32)


class TestAgreement:
    def test_anchors_by_hand(self):
        expected = np.zeros((1, 6, 3), np.float32)
        expected[0, 2, 1], expected[0, 4, 0] = 40, 0.5
        found = expected.copy()
        found[0, 2, 1], found[0, 5, 2] = 38, 0.25
        assert compare_anchors(expected, found) == Agreement(
            boxes=Difference(max_abs=2, scale=40), scores=Difference(max_abs=0.25, scale=0.5), rows=3
        )

    def test_anchors_of_other_tasks_by_hand(self):
        """One class, two key points with a visibility each: rows 5, 6, 8, 9 are places, rows 7 and 10 are not."""
        expected = np.zeros((1, 11, 3), np.float32)
        expected[0, 9, 1], expected[0, 7, 0] = 40, 0.5
        found = expected.copy()
        found[0, 9, 1], found[0, 10, 2] = 38, 0.25
        agreement = compare_anchors(expected, found, {"key_points": [0, 1, 3, 4], "visibility": [2, 5]})
        assert agreement.extras == {
            "key_points": Difference(max_abs=2, scale=40),
            "visibility": Difference(max_abs=0.25, scale=0.5),
        }
        assert agreement.boxes.max_abs == agreement.scores.max_abs == 0
        assert list(agreement.parts) == ["boxes", "scores", "key_points", "visibility"]

    def test_extras_of_detections_are_compared_between_the_same_objects(self):
        expected = np.concatenate([detections(), np.arange(20, dtype=np.float32)[None, :, None]], axis=2)
        shuffled = np.random.default_rng(0).permutation(expected, axis=1)
        assert compare_detections(expected, shuffled, {"angles": [0]}, tolerance=1e-3).extras["angles"].max_abs == 0
        found = expected.copy()
        found[0, 0, 6] += 3  # a sure detection with another angle
        found[0, -1, 6] += 5  # and one at the edge of the top-k
        agreement = compare_detections(expected, found, {"angles": [0]}, tolerance=1e-3)
        assert agreement.extras["angles"] == Difference(max_abs=3, scale=19)
        assert (agreement.boxes.max_abs, agreement.excused) == (0, 1)

    @pytest.mark.parametrize("seed", range(5))
    def test_order_of_detections_does_not_matter(self, seed):
        expected = detections(seed)
        shuffled = np.random.default_rng(seed).permutation(expected, axis=1)
        agreement = compare_detections(expected, shuffled, tolerance=1e-3)
        assert agreement.boxes.max_abs == agreement.scores.max_abs == agreement.excused == 0

    def test_other_row_at_the_edge_is_excused(self):
        expected = detections()
        found = expected.copy()
        found[0, -1, :4] += 50
        agreement = compare_detections(expected, found, tolerance=1e-3)
        assert (agreement.boxes.max_abs, agreement.excused) == (0, 1)

    def test_other_row_above_the_edge_is_not(self):
        expected = detections()
        found = expected.copy()
        found[0, 0, :4] += 5
        agreement = compare_detections(expected, found, tolerance=1e-3)
        assert agreement.boxes.max_abs == pytest.approx(5, rel=1e-5)
        assert agreement.excused == 0

    def test_other_class_counts_as_the_whole_scale(self):
        expected = detections()
        found = expected.copy()
        found[0, 0, 5] = 9
        assert compare_detections(expected, found, tolerance=1e-3).boxes.max_rel == 1

    def test_score_difference_is_found(self):
        expected = detections()
        found = expected.copy()
        found[0, 3, 4] += 0.001
        agreement = compare_detections(expected, found, tolerance=1e-2)
        assert agreement.scores.max_abs == pytest.approx(0.001, rel=1e-3)

    def test_ties_alone_prove_nothing(self):
        expected = detections()
        expected[..., 4] = 0.5
        found = expected + np.float32([7, 7, 7, 7, 0, 0])
        agreement = compare_detections(expected, found, tolerance=1e-3)
        report = ParityReport(
            artefact="a", backend="b", precision="fp32", imgsz_px=64, images=1, tolerance=1e-3, agreement=agreement
        )
        assert agreement.excused == agreement.rows
        assert not report.passed
