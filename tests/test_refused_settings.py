"""Bad settings, through the command line: exit code 2, words that help, and nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import PRUNE, contents, run_settings, words_of, write_yaml

from yolo_prune.hosts.slim import MARKER
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint


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

    @pytest.mark.parametrize("word", ["target_macs=0.3", "criterion=l1", "allocation=uniform", "round_to=4"])
    def test_a_plan_and_what_it_has_chosen_already(self, dense, refused, word):
        message = refused("prune", f"model={dense}", "out=slim.pt", "plan=plan.json", word)
        assert f"plan= together with {word}" in message


class TestNames:
    @pytest.mark.parametrize(
        ("key", "value", "nearest"),
        [
            ("criterion", "bnscale", "bn_scale"),
            ("criterion", "magic", "l1, l2, fpgm"),
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

    @pytest.mark.parametrize(
        ("word", "nearest"), [("prun", "prune"), ("evalute", "evaluate"), ("sharpen", "inspect, ")]
    )
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


class TestSizes:
    @pytest.mark.parametrize("imgsz", ["0", "-32", "70", "big"])
    @pytest.mark.parametrize("verb", ["inspect", "evaluate", "export"])
    def test_image_side(self, verb, imgsz, dense, data, desk, refused):
        assert "imgsz" in refused(*words_of(verb, dense, data, desk), f"imgsz={imgsz}").splitlines()[0]


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
            ({"model": "yolov8n-cls.yaml"}, "task 'classify'"),
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
