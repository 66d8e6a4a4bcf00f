"""Bad input, through the command line: exit code 2, words that help, and a disk that looks as it did before."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_files import Payload, save_as_host
from command_line import contents
from models import lively
from torch import nn
from ultralytics.utils import SAFE_LOAD

from yolo_prune.hosts.ultralytics.checkpoints import MARKER, read_checkpoint
from yolo_prune.plan import PrunePlan

PRUNE = ("out=slim.pt", "target_macs=0.5")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The user's folder, and the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dense(desk, dense_checkpoint):
    return Path(shutil.copy(dense_checkpoint, desk / "dense.pt"))


@pytest.fixture
def slim(desk, slim_checkpoint):
    return Path(shutil.copy(slim_checkpoint, desk / "slim_before.pt"))


@pytest.fixture
def data(desk, tiny_data):
    """A data yaml of the user's that names the drawn images."""
    return write_yaml(desk / "data.yaml", {**yaml.safe_load(tiny_data.read_text()), "path": str(tiny_data.parent)})


@pytest.fixture
def refused(desk, command):
    """Run words that must be refused; return the message."""

    def run(*words: object) -> str:
        before = contents(desk)
        outcome = command(*words)
        assert outcome.code == 2
        assert contents(desk) == before
        assert outcome.err.startswith("error: ")
        assert "expected: " in outcome.err
        assert "Traceback" not in outcome.err
        return outcome.err

    return run


def write_yaml(path: Path, value: object) -> Path:
    path.write_text(yaml.safe_dump(value))
    return path


def run_settings(desk: Path, data: Path, /, **more: object) -> Path:
    """Write settings of `run` that are right but for what `more` says."""
    settings = {"model": "yolov8n.yaml", "data": str(data), "out": str(desk / "run"), "imgsz": 64}
    return write_yaml(
        desk / "run.yaml", {**settings, "train": {"epochs": 1}, "prune": {"target_macs": 0.5}, "formats": [], **more}
    )


def words_of(verb: str, model: Path, data: Path, desk: Path) -> list[str]:
    """Return words that make a verb read a checkpoint, all else being right."""
    more = {
        "inspect": [],
        "prune": [*PRUNE],
        "finetune": [f"data={data}", "epochs=1"],
        "evaluate": [f"data={data}"],
        "export": ["out=artefacts"],
    }
    if verb == "benchmark":
        return [verb, f"models=[{model}]", "imgsz=64"]
    if verb == "run":
        return [verb, str(run_settings(desk, data)), f"model={model}"]
    return [verb, f"model={model}", *more[verb]]


VERBS = ("inspect", "prune", "finetune", "evaluate", "export", "benchmark", "run")


class TestCheckpoints:
    @pytest.mark.parametrize("module", [nn.Identity(), nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(3, 4, 1))])
    @pytest.mark.parametrize("verb", ["prune", "inspect"])
    def test_a_module_that_is_no_detector(self, verb, module, desk, refused):
        torch.save({"model": module, "train_args": "oops"}, desk / "module.pt")
        words = PRUNE if verb == "prune" else ()
        assert f"holds a {type(module).__name__}" in refused(verb, "model=module.pt", *words)

    @pytest.mark.parametrize("verb", VERBS)
    def test_no_file(self, verb, desk, data, refused):
        words = words_of(verb, desk / "absent.pt", data, desk)
        assert "absent.pt'" in refused(*words)

    def test_folder(self, desk, refused):
        assert "no file" in refused("prune", f"model={desk}", *PRUNE)

    @pytest.mark.parametrize("content", ["shopping list\n", "80 apples"])
    def test_text_file(self, desk, refused, content):
        (desk / "notes.pt").write_text(content)
        assert "notes.pt': it is not a checkpoint" in refused("prune", "model=notes.pt", *PRUNE)

    def test_empty_file(self, desk, refused):
        (desk / "empty.pt").touch()
        assert "empty.pt': it is empty" in refused("prune", "model=empty.pt", *PRUNE)

    def test_file_that_may_not_be_read(self, dense, refused, monkeypatch):
        def deny(*_, **__):
            raise PermissionError(13, "Permission denied")  # chmod would not keep root out

        monkeypatch.setattr("ultralytics.nn.tasks.torch_load", deny)
        assert "dense.pt': Permission denied" in refused("prune", f"model={dense}", *PRUNE)

    def test_weights_without_model(self, dense, refused):
        torch.save(read_checkpoint(dense).model.state_dict(), "weights.pt")
        message = refused("prune", "model=weights.pt", *PRUNE)
        assert "'weights.pt' holds no model" in message
        assert "state_dict" in message

    @pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
    def test_truncated(self, dense, refused, part):
        whole = dense.read_bytes()
        Path("cut.pt").write_bytes(whole[: int(len(whole) * part)])
        assert "cut.pt': it is cut off or damaged" in refused("prune", "model=cut.pt", *PRUNE)

    @pytest.mark.parametrize("task", ["segment", "classify"])
    def test_unsupported_task(self, refused, task):
        from ultralytics import YOLO

        YOLO({"segment": "yolov8n-seg.yaml", "classify": "yolov8n-cls.yaml"}[task]).save("other.pt")
        message = refused("prune", "model=other.pt", *PRUNE)
        assert f"task '{task}'" in message
        assert "detect" in message

    @pytest.mark.parametrize("verb", ["prune", "finetune", "run"])
    def test_fused(self, verb, desk, slim, data, refused):
        """A fused slim model still carries the marker of a slim one."""
        model = read_checkpoint(slim).model
        marker = getattr(model, MARKER)
        model.fuse(verbose=False)
        setattr(model, MARKER, marker)
        fused = save_as_host(model, desk / "fused.pt")
        words = words_of(verb, fused, data, desk)
        message = refused(*words)
        assert "is fused" in message
        assert "best.pt" in message

    @pytest.mark.data
    def test_classic_yolov5(self, shared_data, refused):
        weights = shared_data / "weights" / "yolov5n_classic_coco.pt"
        assert "it names 'models.yolo." in refused("prune", f"model={weights}", *PRUNE)


class TestForeignClasses:
    """A checkpoint is a program to an unwary reader: none of its lines may run."""

    @pytest.fixture(params=["as the model", "beside a good model"])
    def trap(self, request, desk, dense_checkpoint):
        payload = Payload(desk / "ran")
        if request.param == "as the model":
            torch.save({"model": payload}, desk / "trap.pt")
        else:
            save_as_host(read_checkpoint(dense_checkpoint).model, desk / "trap.pt", train_metrics=payload)
        return desk / "trap.pt"

    def test_payload_is_live(self, trap, desk):
        assert not SAFE_LOAD  # the host was imported first, as in a user's script, and would run it
        torch.load(trap, weights_only=False)
        assert (desk / "ran").exists()  # or the tests below would prove nothing

    @pytest.mark.parametrize("verb", VERBS)
    def test_is_refused_and_does_not_run(self, verb, trap, desk, data, refused):
        words = words_of(verb, trap, data, desk)
        message = refused(*words)
        assert "system', which belongs to neither torch nor Ultralytics" in message
        assert not (desk / "ran").exists()


class TestTargets:
    @pytest.mark.parametrize("unit", ["macs", "params"])
    @pytest.mark.parametrize("target", ["0", "1.2", "1", "-0.5", "nan", "half", "[0.5]", "true"])
    def test_nonsense(self, dense, refused, unit, target):
        message = refused("prune", f"model={dense}", "out=slim.pt", f"target_{unit}={target}")
        assert f"target_{unit}" in message.splitlines()[0]
        assert "fraction" in message

    @pytest.mark.parametrize(("targets", "count"), [((), 0), (("target_macs=0.5", "target_params=0.5"), 2)])
    def test_one_is_needed(self, dense, refused, targets, count):
        assert f"{count} targets given" in refused("prune", f"model={dense}", "out=slim.pt", *targets)

    @pytest.mark.parametrize("unit", ["macs", "params"])
    def test_below_the_floors_names_the_smallest_and_that_works(self, dense, refused, command, unit):
        floors = ("min_channels=32", "max_fraction=0.7", "round_to=8")
        message = refused("prune", f"model={dense}", "out=slim.pt", f"target_{unit}=0.05", *floors)
        reachable = re.search(r"at least (0\.\d+)", message)[1]
        assert command("prune", f"model={dense}", "out=slim.pt", f"target_{unit}={reachable}", *floors).code == 0
        marker = getattr(read_checkpoint(Path("slim.pt")).model, MARKER)
        assert marker["after"][unit] <= float(reachable) * marker["before"][unit]

    @pytest.mark.parametrize(
        "word", ["min_channels=0", "max_fraction=1", "max_fraction=-0.1", "round_to=0", "round_to=eight", "imgsz=70"]
    )
    def test_limits_out_of_range(self, dense, refused, word):
        assert word.partition("=")[0] in refused("prune", f"model={dense}", *PRUNE, word).splitlines()[0]


class TestRepetition:
    def test_a_key_given_twice(self, dense, refused):
        message = refused("prune", f"model={dense}", "out=slim.pt", "target_macs=0.5", "target_macs=0.3")
        assert "'target_macs' is given twice" in message

    def test_two_outputs_of_one_name(self, dense, refused):
        assert "same path" in refused("prune", f"model={dense}", *PRUNE, "save_plan=slim.pt")

    def test_a_plan_and_a_target(self, dense, refused):
        assert "plan= together with a target" in refused("prune", f"model={dense}", *PRUNE, "plan=plan.json")


class TestNames:
    @pytest.mark.parametrize(
        ("key", "value", "nearest"),
        [
            ("criterion", "bnscale", "bn_scale"),
            ("criterion", "taylor", "bn_scale, l1, l2"),
            ("allocation", "globl", "global"),
            ("reduction", "avg", "sum, mean, max"),
            ("normalization", "meen", "mean"),
        ],
    )
    def test_unknown_choice(self, dense, refused, key, value, nearest):
        message = refused("prune", f"model={dense}", *PRUNE, f"{key}={value}")
        assert f"unknown {key} '{value}'" in message
        assert nearest in message

    @pytest.mark.parametrize(
        ("verb", "typo", "nearest"),
        [
            ("inspect", "imgz", "imgsz"),
            ("prune", "target_mac", "target_macs"),
            ("finetune", "epoch", "epochs"),
            ("finetune", "resme", "resume"),
            ("evaluate", "splt", "split"),
            ("export", "formats", "format"),
            ("benchmark", "thread", "threads"),
            ("run", "fine_tune.epochs", "finetune"),
        ],
    )
    def test_key_with_a_typo(self, verb, typo, nearest, dense, data, desk, refused):
        words = words_of(verb, dense, data, desk)
        message = refused(*words, f"{typo}=3")
        assert f"unknown key '{typo}'" in message
        assert f"'{nearest}'?" in message

    @pytest.mark.parametrize(
        ("part", "typo", "nearest"),
        [("train", "epoch", "epochs"), ("prune", "criterium", "criterion"), ("finetune", "ir0", "lr0")],
    )
    def test_key_with_a_typo_inside_run_settings(self, part, typo, nearest, data, desk, refused):
        settings = run_settings(desk, data)
        message = refused("run", settings, f"{part}.{typo}=3")
        assert f"unknown key '{typo}'" in message
        assert f"'{nearest}'?" in message

    @pytest.mark.parametrize(("word", "nearest"), [("prun", "prune"), ("evalute", "evaluate"), ("train", "inspect, ")])
    def test_unknown_command(self, refused, word, nearest):
        message = refused(word)
        assert f"unknown command '{word}'" in message
        assert nearest in message

    @pytest.mark.parametrize("word", ["target_macs", "=0.5", "--target-macs"])
    def test_not_key_value(self, dense, refused, word):
        assert "key=value" in refused("prune", f"model={dense}", *PRUNE, word)

    @pytest.mark.parametrize("verb", ["prune", "evaluate", "export", "benchmark", "inspect", "finetune"])
    def test_missing_key(self, verb, refused):
        assert "is required" in refused(verb)


class TestPlans:
    @pytest.fixture
    def plan(self, desk, slim_checkpoint):
        path = desk / "plan.json"
        PrunePlan.from_json(getattr(read_checkpoint(slim_checkpoint).model, MARKER)["plan"]).save(path)
        return path

    def test_for_another_checkpoint(self, desk, plan, refused):
        """The same architecture with other weights: every name and width would fit."""
        save_as_host(lively("yolov8n", seed=1), desk / "other.pt")
        message = refused("prune", "model=other.pt", "out=slim.pt", f"plan={plan}")
        assert "plan belongs to checkpoint" in message
        assert "make a new plan" in message

    def test_for_its_own_checkpoint_is_applied(self, dense, plan, command):
        assert command("prune", f"model={dense}", "out=slim.pt", f"plan={plan}").code == 0

    @pytest.mark.parametrize("content", [None, "not json", "{}", '{"format": "yolo_prune.plan/1"}', "[]"])
    def test_malformed(self, desk, dense, refused, content):
        if content is not None:
            (desk / "plan.json").write_text(content)
        assert "plan" in refused("prune", f"model={dense}", "out=slim.pt", "plan=plan.json").splitlines()[0]


class TestOutputs:
    @pytest.mark.parametrize("key", ["out", "save_plan", "json"])
    def test_that_exists_is_left_alone(self, desk, dense, refused, key):
        (desk / "taken").write_text("a year of work")
        words = {"out": "slim.pt", "save_plan": "plan.json", "json": "result.json", key: "taken"}
        message = refused("prune", f"model={dense}", "target_macs=0.5", *(f"{k}={v}" for k, v in words.items()))
        assert "'taken' already exists" in message

    def test_that_is_the_input(self, dense, refused):
        assert "already exists" in refused("prune", f"model={dense}", f"out={dense}", "target_macs=0.5")

    def test_artefact_that_exists(self, desk, dense, refused):
        (desk / "artefacts").mkdir()
        (desk / "artefacts" / "dense.onnx").write_text("mine")
        assert "dense.onnx' already exists" in refused("export", f"model={dense}", "out=artefacts", "imgsz=64")

    @pytest.mark.parametrize("verb", ["prune", "export"])
    def test_below_a_file(self, verb, dense, refused):
        words = {"prune": PRUNE[1:], "export": ("imgsz=64",)}[verb]
        assert "cannot write" in refused(verb, f"model={dense}", f"out={dense}/slim.pt", *words)

    @pytest.mark.parametrize("verb", ["prune", "export"])
    def test_in_a_read_only_folder(self, verb, desk, dense, refused):
        folder = desk / "read_only"
        if os.geteuid() == 0:  # to whom the mode of a folder means nothing
            folder = Path("/proc")
        else:
            folder.mkdir(mode=0o500)
        out = folder / "slim.pt" if verb == "prune" else folder
        words = {"prune": PRUNE[1:], "export": ("imgsz=64",)}[verb]
        message = refused(verb, f"model={dense}", f"out={out}", *words)
        assert "cannot write" in message
        assert "writable folder" in message

    @pytest.mark.parametrize("verb", ["prune", "export"])
    def test_on_a_full_disk_nothing_half_written_is_left(self, verb, dense, refused):
        """Files cannot grow beyond 1 MiB here: writing fails in the middle, as on a disk without room."""
        resource = pytest.importorskip("resource")
        words = {"prune": ["out=new/slim.pt", "target_macs=0.5"], "export": ["out=new/artefacts", "imgsz=64"]}[verb]
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            message = refused(verb, f"model={dense}", *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "cannot write" in message
        assert "free space" in message


class TestData:
    @pytest.mark.parametrize(
        ("verb", "split"),
        [("finetune", "val"), ("finetune", "train"), ("evaluate", "val"), ("export", "val"), ("run", "train")],
    )
    def test_missing_split(self, verb, split, slim, data, desk, refused):
        description = yaml.safe_load(data.read_text())
        write_yaml(data, {key: value for key, value in description.items() if key != split})
        words = words_of(verb, slim, data, desk)
        if verb == "export":
            words += [f"data={data}", "imgsz=64"]
        message = refused(*words)
        assert f"has no split '{split}' (it has: " in message
        assert f"`{split}: path/to/images`" in message

    def test_missing_split_that_is_measured_at_the_end(self, data, desk, refused):
        description = yaml.safe_load(data.read_text())
        write_yaml(data, {key: value for key, value in description.items() if key != "test"})
        assert "no split 'test'" in refused("run", run_settings(desk, data, splits=["val", "test"]))

    @pytest.mark.parametrize("verb", ["finetune", "evaluate"])
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"val": "images/absent"}, "absent', which does not exist"),
            ({"val": "labels/val"}, "labels/val', which has no image"),
            ({"val": 7}, "7', which does not exist"),
            ({"names": None, "nc": None}, "is not a data description"),
        ],
    )
    def test_that_misleads(self, verb, change, words, slim, data, desk, refused):
        write_yaml(data, {**yaml.safe_load(data.read_text()), **change})
        assert words in refused(*words_of(verb, slim, data, desk))

    @pytest.mark.parametrize("content", [None, "- a\n- b\n", "train: [\n", "just words"])
    def test_not_a_description(self, slim, desk, refused, content):
        path = desk / "broken.yaml"
        if content is not None:
            path.write_text(content)
        assert "broken.yaml'" in refused("evaluate", f"model={slim}", f"data={path}").splitlines()[0]


class TestTraining:
    @pytest.mark.parametrize(
        "word", ["epochs=many", "epochs=0", "lr0=high", "optimizer=Newton", "device=99", "batch=[1]"]
    )
    def test_values_that_the_host_refuses(self, slim, data, refused, word, tmp_path_factory):
        words = {"epochs": "1", "imgsz": "64", "plots": "false", "workers": "0", "device": "cpu"}
        words |= {"project": str(tmp_path_factory.mktemp("trainings")), word.partition("=")[0]: word.partition("=")[2]}
        message = refused("finetune", f"model={slim}", f"data={data}", *(f"{k}={v}" for k, v in words.items()))
        assert "Ultralytics refuses this training" in message
        assert word.partition("=")[2].strip("[]") in message

    def test_other_weights_for_a_slim_network(self, slim, data, refused):
        message = refused("finetune", f"model={slim}", f"data={data}", "epochs=1", "pretrained=false")
        assert "pretrained=False with a slim checkpoint" in message

    def test_dense_checkpoint(self, dense, data, refused):
        assert "not a slim checkpoint" in refused("finetune", f"model={dense}", f"data={data}", "epochs=1")

    def test_nothing_to_resume(self, slim, refused):
        assert "no training to resume" in refused("finetune", f"model={slim}", "resume=true")

    def test_no_data(self, slim, refused):
        assert "'data=' is required" in refused("finetune", f"model={slim}", "epochs=1")


class TestRuns:
    """Everything is looked at before the first of several long stages."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"prune": {"target_macs": 1.5}}, "target_macs=1.5"),
            ({"prune": {}}, "0 targets given"),
            ({"prune": {"target_macs": 0.5, "criterion": "l3"}}, "unknown criterion 'l3'"),
            ({"prune": {"plan": "absent.json"}}, "cannot read plan 'absent.json'"),
            ({"train": {"epochs": "many"}}, "'epochs=many'"),
            ({"train": {"epochs": 0}}, "train.epochs is 0"),
            ({"train": {"epochs": 1, "save_dir": "elsewhere"}}, "unknown key 'save_dir'"),
            ({"train": 5}, "train"),
            ({"finetune": {"lr0": "high"}}, "'lr0=high'"),
            ({"finetune": {"pretrained": False}}, "unknown key 'pretrained'"),
            ({"formats": ["onx"]}, "unknown format 'onx'"),
            ({"formats": "onnx"}, "formats: one value where a list is needed"),
            ({"model": "yolov8.5n.yaml"}, "cannot build 'yolov8.5n.yaml'"),
            ({"model": "yolov8n-seg.yaml"}, "task 'segment'"),
            ({"imgsz": 70}, "imgsz=70"),
            ({"runs": 0}, "runs=0"),
            ({"threads": 0}, "threads=0"),
            ({"splits": ["val", "tset"]}, "no split 'tset'"),
            ({"data": "absent.yaml"}, "absent.yaml"),
        ],
    )
    def test_settings_that_would_fail_later(self, change, words, data, desk, refused):
        assert words in refused("run", run_settings(desk, data, **change))

    @pytest.mark.parametrize("words", [(), ("absent.yaml",), ("out=somewhere",)])
    def test_no_settings(self, refused, words):
        assert "setting" in refused("run", *words)

    def test_settings_that_are_no_mapping(self, desk, refused):
        assert "holds a list" in refused("run", write_yaml(desk / "list.yaml", [1, 2]))


class TestBenchmarks:
    @pytest.mark.parametrize(
        ("words", "found"),
        [
            (("models=[]",), "models=[]"),
            (("models=[",), "models=["),
            (("models=dense.pt",), "one value where a list is needed"),
            (("models=[dense.pt,dense.pt]",), "models=['dense.pt', 'dense.pt']"),
            (("models=[absent.onnx]",), "'absent.onnx' does not exist"),
            (("models=[dense.pt]", "runs=0"), "runs=0"),
            (("models=[dense.pt]", "threads=0"), "threads=0"),
            (("models=[dense.pt]", "imgsz=70"), "imgsz=70"),
        ],
    )
    @pytest.mark.usefixtures("dense")
    def test_nothing_to_measure(self, refused, words, found):
        size = () if "imgsz=70" in words else ("imgsz=64",)
        assert found in refused("benchmark", *size, *words).splitlines()[0]


class TestSizes:
    @pytest.mark.parametrize("imgsz", ["0", "-32", "70", "big"])
    @pytest.mark.parametrize("verb", ["inspect", "evaluate", "export"])
    def test_image_side(self, verb, imgsz, dense, data, desk, refused):
        assert "imgsz" in refused(*words_of(verb, dense, data, desk), f"imgsz={imgsz}").splitlines()[0]


class TestDebug:
    def test_shows_where_it_happened(self, desk, command):
        outcome = command("prune", "model=absent.pt", "out=slim.pt", "target_macs=0.5", "--debug")
        assert outcome.code == 2
        assert "Traceback" in outcome.err
        assert "CheckpointError" in outcome.err
        assert not contents(desk)

    def test_shows_what_the_host_raised(self, desk, command):
        (desk / "notes.pt").write_text("shopping list")
        outcome = command("--debug", "prune", "model=notes.pt", "out=slim.pt", "target_macs=0.5")
        assert outcome.err.count("Traceback") == 2
