"""The drawn data set: the same for a seed, honest labels, complete or absent, and clear about wrong arguments."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import cv2
import drawing
import labels
import numpy as np
import pytest
import shapes
import yaml
from command_line import contents

from yolo_prune.errors import ConfigError, OutputError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "datasets" / "shapes.py"
SMALL = {"seed": 3, "train": 6, "val": 4, "test": 4, "imgsz_px": 96}


def run_script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def shape_of(mask: np.ndarray, *, label: int = 0, beyond_px: int = 0):
    rows, columns = drawing.bounds(mask)
    corners = [(x, y) for x, y in ((columns.start, rows.start), (columns.stop, rows.start), (columns.stop, rows.stop))]
    outline = np.array([*corners, (columns.start, rows.stop)], float)
    return drawing.Shape(label=label, mask=mask, area_px=int(mask.sum()) + beyond_px, outline=outline)


def rectangle(rows: slice, columns: slice, side: int = 10) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[rows, columns] = True
    return mask


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return shapes.draw_dataset(tmp_path_factory.mktemp("shapes") / "data", **SMALL).parent


class TestSameForASeed:
    def test_same_seed_same_bytes(self, drawn, tmp_path):
        again = shapes.draw_dataset(tmp_path / "again", **SMALL).parent
        assert contents(again) == contents(drawn)

    def test_every_image_is_another(self, drawn):
        images = {path: content for path, content in contents(drawn).items() if path.endswith(".jpg")}
        assert len(set(images.values())) == len(images) == 14

    def test_other_seed_other_images(self, drawn, tmp_path):
        other = shapes.draw_dataset(tmp_path / "other", **SMALL | {"seed": 4}).parent
        of_images = [{c for path, c in contents(folder).items() if path.endswith(".jpg")} for folder in (drawn, other)]
        assert not of_images[0] & of_images[1]

    def test_more_images_keep_the_first_ones(self, drawn, tmp_path):
        larger = contents(shapes.draw_dataset(tmp_path / "larger", **SMALL | {"train": 8}).parent)
        assert {item for item in contents(drawn).items() if not item[0].endswith(".json")} <= larger.items()


class TestLayout:
    def test_description(self, drawn):
        assert yaml.safe_load((drawn / "data.yaml").read_text()) == {
            "train": "images/train",
            "val": "images/val",
            "test": "images/test",
            "nc": 4,
            "names": {0: "disc", 1: "square", 2: "triangle", 3: "star"},
        }

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_an_image_and_a_label_file_each(self, drawn, split):
        images = sorted((drawn / "images" / split).iterdir())
        labels = sorted((drawn / "labels" / split).iterdir())
        assert [path.stem for path in images] == [path.stem for path in labels]
        assert len(images) == SMALL[split]
        assert {cv2.imread(str(path)).shape for path in images} == {(96, 96, 3)}

    def test_labels_are_the_drawn_shapes(self, drawn):
        _, expected = drawing.draw_image(np.random.default_rng([3, 1, 2]), 96)  # seed, second split, third image
        rows = np.loadtxt(drawn / "labels" / "val" / "00002.txt", ndmin=2)
        assert rows[:, 0].tolist() == [shape.label for shape in expected]
        np.testing.assert_allclose(rows[:, 1:], [drawing.box(shape.mask) for shape in expected], atol=1e-6)


class TestHonestLabels:
    def test_box_by_hand(self):
        # Rows 2, 3 and 4, columns 5 to 8 of ten: centre (7, 3.5), four wide and three high.
        assert drawing.box(rectangle(slice(2, 5), slice(5, 9))) == pytest.approx((0.7, 0.35, 0.4, 0.3))

    def test_visible_fractions_by_hand(self):
        below = shape_of(rectangle(slice(0, 4), slice(0, 5)))  # 20 pixels, of which 4 are covered
        above = shape_of(rectangle(slice(2, 6), slice(3, 7)), beyond_px=16)  # 16 in the frame, as many beyond it
        assert drawing.visible_fractions([below, above]) == [0.8, 0.5]
        assert drawing.visible_fractions([above, below]) == [12 / 32, 1.0]

    @pytest.mark.parametrize("seed", range(20))
    def test_every_shape_is_visible(self, seed):
        placed = drawing.place_shapes(np.random.default_rng(seed), 96)
        assert placed
        assert min(drawing.visible_fractions(placed)) >= drawing.MIN_VISIBLE

    @pytest.mark.parametrize("seed", range(20))
    def test_paint_fills_the_box_exactly(self, seed):
        random = np.random.default_rng(seed)
        shape = drawing.random_shape(random, 96)
        canvas = np.full((96, 96, 3), -1000, np.float32)
        drawing.paint(random, canvas, shape)
        changed = (canvas > -500).all(axis=2)
        np.testing.assert_array_equal(changed, shape.mask)
        x, y, width, height = (value * 96 for value in drawing.box(changed))
        rows, columns = np.nonzero(changed)
        assert (x - width / 2, x + width / 2) == pytest.approx((columns.min(), columns.max() + 1))
        assert (y - height / 2, y + height / 2) == pytest.approx((rows.min(), rows.max() + 1))

    def test_area_counts_what_lies_beyond_the_frame(self):
        drawn = [drawing.random_shape(np.random.default_rng(seed), 96) for seed in range(60)]
        hidden = [shape.area_px - int(shape.mask.sum()) for shape in drawn]
        assert min(hidden) == 0 < max(hidden)

    def test_all_classes_and_scales_occur(self):
        drawn = [drawing.random_shape(np.random.default_rng(seed), 96) for seed in range(200)]
        whole = [shape for shape in drawn if shape.area_px == shape.mask.sum()]
        lengths = [max(drawing.box(shape.mask)[2:]) for shape in whole]
        assert {shape.label for shape in drawn} == set(range(len(drawing.CLASSES)))
        assert max(lengths) > 3 * min(lengths)


def filled(points: np.ndarray, side: int) -> np.ndarray:
    """Return the pixels of an outline in the coordinates of labels, 64 to the pixel."""
    pixels = np.zeros((side * 8, side * 8), np.uint8)
    cv2.fillPoly(pixels, [np.rint(points * 8 - 0.5).astype(np.int32)], 1)
    return pixels > 0


class TestTasks:
    """The same images with other labels, in the formats that the host reads."""

    def test_detection_sets_stay_as_they_were(self, drawn):
        assert "task" not in (drawn / "shapes.json").read_text()
        assert "kpt_shape" not in (drawn / "data.yaml").read_text()
        digest = hashlib.sha256()
        for path in sorted((drawn / "labels").rglob("*.txt")):
            digest.update(path.read_bytes())
        assert digest.hexdigest() == "d43bee4a245282ba35dcae2e0e26ad74c86e4457dfe4d9d36af0a643475408d2"

    @pytest.mark.parametrize("task", ["segment", "pose", "obb"])
    def test_images_are_the_same_and_every_line_has_its_class(self, drawn, tmp_path, task):
        folder = shapes.draw_dataset(tmp_path / "data", **SMALL, task=task).parent
        for path in drawn.rglob("*.jpg"):
            assert (folder / path.relative_to(drawn)).read_bytes() == path.read_bytes()
        for path in drawn.rglob("*.txt"):
            lines, other = (file.read_text().splitlines() for file in (path, folder / path.relative_to(drawn)))
            assert [line.split()[0] for line in lines] == [line.split()[0] for line in other]
        again = shapes.draw_dataset(tmp_path / "again", **SMALL, task=task).parent
        assert contents(again) == contents(folder)

    def test_another_task_is_another_set(self, drawn):
        with pytest.raises(OutputError, match="another one"):
            shapes.draw_dataset(drawn, **SMALL, task="pose")

    def test_unknown_task(self, tmp_path):
        with pytest.raises(ConfigError, match="unknown task 'segmentation'"):
            shapes.draw_dataset(tmp_path / "data", **SMALL, task="segmentation")

    def test_labels_by_hand(self):
        # Rows 2, 3 and 4, columns 5 to 8 of ten, of which row 2 from column 7 on is covered by a later shape.
        shape = shape_of(rectangle(slice(2, 5), slice(5, 9)))
        covered = rectangle(slice(0, 3), slice(7, 10))
        assert labels.bounding_box(shape, covered) == pytest.approx([0.7, 0.35, 0.4, 0.3])
        assert labels.polygon(shape, covered) == pytest.approx([0.5, 0.2, 0.9, 0.2, 0.9, 0.5, 0.5, 0.5])
        corners = np.reshape(labels.rotated_box(shape, covered), (4, 2))
        assert sorted(map(tuple, corners.round(6))) == [(0.5, 0.2), (0.5, 0.5), (0.9, 0.2), (0.9, 0.5)]

    def test_key_points_by_hand(self):
        outline = np.array([[5, -1], [8.5, 4], [6, 8], [2.5, 3]])  # the topmost one is beyond the frame
        shape = drawing.Shape(label=1, mask=rectangle(slice(0, 8), slice(2, 9)), area_px=60, outline=outline)
        label = labels.pose(shape, rectangle(slice(7, 10), slice(0, 10)))  # covers the lowest one
        assert label[:4] == pytest.approx([0.55, 0.4, 0.7, 0.8])
        assert label[4:] == pytest.approx([0, 0, 0, 0.85, 0.4, 2, 0.6, 0.8, 1, 0.25, 0.3, 2])

    @pytest.mark.parametrize("seed", range(30))
    def test_polygons_cover_what_was_painted(self, seed):
        shape = drawing.random_shape(np.random.default_rng(seed), 96)
        points = np.reshape(labels.polygon(shape, shape.mask), (-1, 2))
        assert 0 <= points.min() <= points.max() <= 1
        painted = shape.mask.repeat(8, axis=0).repeat(8, axis=1)
        outline = cv2.findContours(shape.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        edge = sum(len(part) for part in outline) * 64
        assert (filled(points * 96, 96) ^ painted).sum() < 1.1 * edge  # a pixel's width along the edge

    @pytest.mark.parametrize("seed", range(30))
    def test_rotated_boxes_hold_their_polygon_within_the_frame(self, seed):
        shape = drawing.random_shape(np.random.default_rng(seed), 96)
        corners = np.reshape(labels.rotated_box(shape, shape.mask), (4, 2))
        assert 0 <= corners.min() <= corners.max() <= 1
        sides = np.roll(corners, -1, axis=0) - corners
        assert np.einsum("ij,ij->i", sides, np.roll(sides, -1, axis=0)) == pytest.approx(0, abs=1e-6)  # right angles
        for point in np.reshape(labels.polygon(shape, shape.mask), (-1, 2)):
            assert cv2.pointPolygonTest(corners.astype(np.float32), tuple(map(float, point)), True) > -1e-4

    def test_shapes_at_the_edge_and_all_visibilities_occur(self):
        placed = [drawing.place_shapes(np.random.default_rng(seed), 96) for seed in range(40)]
        lines = [line.split() for shapes_ in placed for line in labels.label_lines(shapes_, "pose")]
        assert {value for line in lines for value in line[7::3]} == {"0.000000", "1.000000", "2.000000"}
        beyond = [shape for shapes_ in placed for shape in shapes_ if shape.area_px > shape.mask.sum()]
        assert beyond


class TestCompleteOrAbsent:
    def test_complete_set_is_left_alone(self, drawn):
        before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
        assert shapes.draw_dataset(drawn, **SMALL) == drawn / "data.yaml"
        assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before

    def test_label_cache_of_the_host_is_no_harm(self, tmp_path):
        data = shapes.draw_dataset(tmp_path / "data", **SMALL)
        (data.parent / "labels" / "train.cache").write_bytes(b"")
        assert shapes.draw_dataset(data.parent, **SMALL) == data

    def test_other_parameters_are_refused(self, drawn):
        before = contents(drawn)
        with pytest.raises(OutputError, match=r"another one: .*'seed': 3"):
            shapes.draw_dataset(drawn, **SMALL | {"seed": 4})
        assert contents(drawn) == before

    def test_foreign_folder_is_refused(self, tmp_path):
        (tmp_path / "mine.txt").write_text("precious")
        with pytest.raises(OutputError, match="no data set of ours"):
            shapes.draw_dataset(tmp_path, **SMALL)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_file_is_refused(self, tmp_path):
        (tmp_path / "data").write_text("precious")
        with pytest.raises(OutputError, match="no data set of ours"):
            shapes.draw_dataset(tmp_path / "data", **SMALL)
        assert (tmp_path / "data").read_text() == "precious"

    def test_set_with_a_lost_image_is_refused(self, tmp_path):
        folder = shapes.draw_dataset(tmp_path / "data", **SMALL).parent
        (folder / "images" / "val" / "00001.jpg").unlink()
        with pytest.raises(OutputError, match="has 3 files"):
            shapes.draw_dataset(folder, **SMALL)

    @pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_interrupted_drawing_leaves_nothing(self, tmp_path, monkeypatch, failure):
        def fail(_):
            raise failure

        monkeypatch.setattr(shapes, "_data_yaml", fail)  # called when all images are there
        with pytest.raises((OutputError, KeyboardInterrupt)):
            shapes.draw_dataset(tmp_path / "deep" / "data", **SMALL)
        assert not list(tmp_path.iterdir())

    def test_nothing_is_left_beside_the_set(self, tmp_path):
        shapes.draw_dataset(tmp_path / "deep" / "data", **SMALL)
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]


class TestCommandLine:
    def test_draws_and_prints_the_description(self, drawn, tmp_path):
        result = run_script("out=data", *(f"{key}={value}" for key, value in SMALL.items()), cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert Path(result.stdout.strip()) == Path("data/data.yaml")
        assert contents(tmp_path / "data") == contents(drawn)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["out=data", "trian=6"], "'train'"),
            (["out=data", "imgsz=96"], "'imgsz_px'"),
            (["--out", "data"], "'--out'"),
            (["seed=1"], "'out=' is required"),
            (["out="], "'out='"),
            (["out=data", "seed"], "'seed'"),
            (["out=data", "seed=one"], "Value 'one'"),
            (["out=data", "seed=-1"], "an integer from 0 on"),
            (["out=data", "val=0"], "an integer from 1 on"),
            (["out=data", "imgsz_px=8"], "an integer from 64 on"),
            (["out=data", "task=obbs"], "expected: 'obb'?"),
            ([], "'out=' is required"),
        ],
    )
    def test_bad_arguments(self, tmp_path, capsys, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert shapes.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert not list(tmp_path.iterdir())

    def test_help(self, tmp_path):
        result = run_script("--help", cwd=tmp_path)
        assert result.returncode == 0
        assert all(key in result.stdout for key in ("out", *SMALL))
        assert not list(tmp_path.iterdir())

    def test_no_traceback(self, tmp_path):
        result = run_script("out=data", "trian=6", cwd=tmp_path)
        assert result.returncode == 2
        assert "unknown key 'trian'" in result.stderr
        assert "Traceback" not in result.stderr

    def test_refusal_is_exit_code_2(self, tmp_path):
        result = run_script("out=.", cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert "already exists" in result.stderr

    def test_range_is_checked_by_the_function_too(self, tmp_path):
        with pytest.raises(ConfigError, match="train=0"):
            shapes.draw_dataset(tmp_path / "data", **SMALL | {"train": 0})
