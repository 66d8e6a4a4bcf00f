"""The faces of the tool: help, JSON beside every table, the script in YOLOv5's style, and settings."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_files import save_as_host
from command_line import KEY_VERBS, Outcome
from models import lively

from yolo_prune import __version__
from yolo_prune.cli import VERBS, script
from yolo_prune.configuration import describe, load, parse, require_known, setting, structured
from yolo_prune.errors import ConfigError
from yolo_prune.hosts.ultralytics.checkpoints import read_checkpoint
from yolo_prune.pipeline.prune_config import PruneConfig

TOOL = Path(__file__).parents[1] / "tools" / "prune_yolo.py"


def strict_json(path: Path) -> dict:
    """Read JSON without the NaN and Infinity that Python would accept and others would not."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def keys_of(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield every key that one can type with its field; those of a part have a dot."""
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.default_factory):
            yield from keys_of(field.default_factory, f"{field.name}.")
        else:
            yield prefix + field.name, field


class TestHelp:
    @pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
    def test_lists_every_command(self, command, words):
        outcome = command(*words)
        assert outcome.code == 0
        assert all(f"\n  {name} " in outcome.out for name in VERBS)
        assert all(verb.summary in outcome.out for verb in VERBS.values())

    @pytest.mark.parametrize("flag", ["--help", "-h"])
    @pytest.mark.parametrize("verb", KEY_VERBS)
    def test_lists_every_key_with_default_and_unit(self, command, verb, flag):
        outcome = command(verb, flag)
        assert outcome.code == 0
        lines = {line.split()[0]: line for line in outcome.out.splitlines()[2:] if line.strip()}
        schema, _ = VERBS[verb].load()
        for name, field in keys_of(schema):
            assert field.metadata["help"] in lines[name]
            assert f"  {shown_default(field)}  " in lines[name] + "  "
        assert "json" in lines

    def test_shows_units_and_required_keys(self, command):
        lines = command("prune", "--help").out.splitlines()
        assert any(line.split()[:3] == ["imgsz", "640", "px"] for line in lines)
        assert any(line.split()[:3] == ["min_channels", "8", "channels"] for line in lines)
        assert any(line.split()[:2] == ["model", "required"] for line in lines)
        assert any(line.split()[:2] == ["target_macs", "not"] for line in lines)

    def test_says_that_training_keys_are_passed_on(self, command):
        assert "Every training key of Ultralytics" in command("finetune", "--help").out

    def test_version(self, command):
        assert command("--version").out == f"yolo-prune {__version__}\n"


def shown_default(field: dataclasses.Field) -> str:
    """Return what `--help` should show for a field."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, list):
        return f"[{','.join(map(str, default))}]"
    words = {"???": "required", "None": "not set", "False": "false", "True": "true"}
    value = words.get(str(default), str(default))
    return f"{value} {field.metadata['unit']}".strip()


class TestJson:
    """Whatever prints a table also writes it down."""

    def test_inspect(self, command, dense_checkpoint, tmp_path):
        outcome = command("inspect", f"model={dense_checkpoint}", "imgsz=320", f"json={tmp_path / 'j.json'}")
        found = strict_json(tmp_path / "j.json")
        assert outcome.code == 0
        assert found["imgsz_px"] == 320
        assert found["params"] == sum(p.numel() for p in read_checkpoint(dense_checkpoint).model.parameters())
        assert all(row["name"] in outcome.out for row in found["rows"])
        assert any(row["lock"] for row in found["rows"])
        assert any(row["ties"] for row in found["rows"])
        assert 0.5 < found["prunable_macs_share"] < 1

    def test_prune(self, command, dense_checkpoint, tmp_path):
        out, record = tmp_path / "slim.pt", tmp_path / "j.json"
        outcome = command("prune", f"model={dense_checkpoint}", f"out={out}", "target_params=0.4", f"json={record}")
        found = strict_json(record)
        assert outcome.code == 0
        assert found["out"] == str(out)
        assert found["plan"]["after"]["params"] <= 0.4 * found["plan"]["before"]["params"]
        assert found["verification"]["macs_counted"] == found["verification"]["macs_predicted"]
        assert "verified" in outcome.out
        assert str(out) in outcome.out

    def test_evaluate(self, command, slim_checkpoint, tiny_data, tmp_path):
        words = (f"model={slim_checkpoint}", f"data={tiny_data}", "split=test", "imgsz=64")
        outcome = command("evaluate", *words, f"json={tmp_path / 'j.json'}")
        found = strict_json(tmp_path / "j.json")
        assert outcome.code == 0
        assert (found["split"], found["images"], found["imgsz_px"]) == ("test", 8, 64)
        assert all(0 <= found[name] <= 1 for name in ("map50", "map50_95", "precision", "recall"))
        assert "mAP50-95" in outcome.out
        assert not [path for path in tmp_path.iterdir() if path.name != "j.json"]

    def test_export_and_benchmark(self, command, slim_checkpoint, dense_checkpoint, tiny_data, tmp_path):
        folder = tmp_path / "artefacts"
        for model in (dense_checkpoint, slim_checkpoint):
            words = (f"model={model}", f"out={folder}", "imgsz=64", f"data={tiny_data}", "images=2")
            outcome = command("export", *words, f"json={tmp_path / f'{model.stem}.json'}")
            assert outcome.code == 0
            assert f"{model.stem}.onnx" in outcome.out
        found = strict_json(tmp_path / "slim.json")
        assert found["artefacts"] == [str(folder / "slim.onnx")]
        (parity,) = found["parity"]
        assert parity["images"] == 2

        artefacts = [str(folder / f"{name}.onnx") for name in ("dense", "slim")]
        words = (f"models=[{','.join(artefacts)}]", "imgsz=64", "runs=3", "warmup=0", "threads=1")
        outcome = command("benchmark", *words, f"json={tmp_path / 'benchmark.json'}")
        found = strict_json(tmp_path / "benchmark.json")
        assert outcome.code == 0
        assert [entry["name"] for entry in found["entries"]] == artefacts
        assert all(len(entry["latencies_ms"]) == 3 for entry in found["entries"])
        assert "1 (baseline)" in outcome.out

    def test_existing_record_is_refused_before_any_work(self, command, dense_checkpoint, tmp_path):
        (tmp_path / "j.json").write_text("mine")
        outcome = command("inspect", f"model={dense_checkpoint}", f"json={tmp_path / 'j.json'}")
        assert outcome.code == 2
        assert outcome.out == ""
        assert (tmp_path / "j.json").read_text() == "mine"


class TestInterruption:
    def test_says_how_to_go_on(self, command, monkeypatch):
        def interrupt(_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("yolo_prune.pipeline.inspect.inspect", interrupt)
        outcome = command("inspect", "model=yolov8n.yaml")
        assert outcome.code == 130
        assert outcome.err == "interrupted; run the same command again to go on\n"


class TestInspect:
    def test_takes_a_yaml_name(self, command, tmp_path):
        outcome = command("inspect", "model=yolov8n.yaml", f"json={tmp_path / 'j.json'}")
        assert outcome.code == 0
        found = strict_json(tmp_path / "j.json")
        assert found["params"] == 3_157_200
        # 8.7 GFLOPs (two per multiply-add) as the host's documentation counts it.
        assert found["macs"] == pytest.approx(8.7e9 / 2, rel=0.02)
        assert "yolov8n.yaml: 4." in outcome.out

    def test_names_the_members_of_each_group(self, command, tmp_path):
        outcome = command("inspect", "model=yolov8n.yaml", f"json={tmp_path / 'j.json'}")
        rows = {row["name"]: row for row in strict_json(tmp_path / "j.json")["rows"]}
        members = {(member["tensor"], member["dim"]) for member in rows["model.1.conv"]["members"]}
        norm = {(f"model.1.bn.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")}
        assert members == {("model.1.conv.weight", 0), ("model.2.cv1.conv.weight", 1)} | norm
        assert rows["model.2.cv1.conv#1"]["ties"] == ["equal split in model.2"]
        pyramid = rows["model.9.cv1.conv"]["members"]  # SPPF reads the same channels four times
        assert {member["entries_per_channel"] for member in pyramid if member["dim"] == 1} == {4}
        (line,) = (line for line in outcome.out.splitlines() if line.startswith("model.2.cv1.conv#2 "))
        assert line.endswith("  model.2.cv1.conv, model.2.cv1.bn, model.2.m.0.cv1.conv +3")

    def test_changes_nothing(self, command, dense_checkpoint):
        before = dense_checkpoint.read_bytes()
        command("inspect", f"model={dense_checkpoint}")
        assert dense_checkpoint.read_bytes() == before


class TestStandaloneTool:
    """`tools/prune_yolo.py`, for those who know YOLOv5's scripts."""

    @pytest.fixture
    def run(self, monkeypatch, capsys):
        """The tool as a function of words, within this process."""

        def script(*words: object) -> Outcome:
            monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(TOOL), run_name="__main__")
            printed = capsys.readouterr()
            return Outcome(end.value.code, printed.out, printed.err)

        return script

    @pytest.mark.slow
    def test_gives_the_plan_of_the_command_line(self, command, dense_checkpoint, tmp_path):
        flags = ("--target-macs", 0.5, "--criterion", "bn_scale", "--round-to", 8, "--min-channels", 16)
        files = ("--out", tmp_path / "by_tool.pt", "--save-plan", tmp_path / "by_tool.json")
        line = [sys.executable, TOOL, "--weights", dense_checkpoint, *flags, *files]
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "verified" in done.stdout
        words = ("target_macs=0.5", "criterion=bn_scale", "round_to=8", "min_channels=16")
        files = (f"out={tmp_path / 'by_cli.pt'}", f"save_plan={tmp_path / 'by_cli.json'}")
        assert command("prune", f"model={dense_checkpoint}", *words, *files).code == 0
        assert strict_json(tmp_path / "by_tool.json") == strict_json(tmp_path / "by_cli.json")
        by_tool, by_cli = (read_checkpoint(tmp_path / name).model.state_dict() for name in ("by_tool.pt", "by_cli.pt"))
        assert all(by_tool[name].equal(by_cli[name]) for name in by_cli)

    def test_refuses_as_the_command_line_does(self, run, tmp_path):
        done = run("--weights", tmp_path / "absent.pt", "--target-macs", 0.5, "--out", tmp_path / "slim.pt")
        assert done.code == 2
        assert done.err.startswith("error: no file '")
        assert not list(tmp_path.iterdir())

    def test_needs_weights_and_a_place(self, run):
        done = run("--target-macs", 0.5)
        assert done.code == 2
        assert "--weights, --out" in done.err

    def test_help_lists_every_setting(self, run):
        shown = run("--help").out
        assert "--weights" in shown
        for field in dataclasses.fields(PruneConfig):
            assert field.name == "model" or f"--{field.name.replace('_', '-')}" in shown


@dataclasses.dataclass(kw_only=True)
class Example:
    name: str = setting(help="a name")
    size: int = setting(640, help="a size", unit="px")
    ratio: float | None = setting(None, help="a ratio")
    places: list[str] = setting(["here"], help="places")
    more: dict[str, Any] = setting({"a": 1}, help="anything")


class TestScripts:
    """A script of one command: the same words, help and exit codes as the command line's."""

    def test_help(self, capsys):
        assert script("Does it.", Example, str, ["--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("Does it.\n\n  name    required  a name\n")
        assert "  places  [here]    places\n" in out

    def test_work(self, capsys):
        assert script("Does it.", Example, lambda config: config.name * 2, ["name=ab"]) == 0
        assert capsys.readouterr().out == "abab"

    @pytest.mark.parametrize(("words", "traceback"), [(["nme=a"], False), (["nme=a", "--debug"], True)])
    def test_bad_input(self, capsys, words, traceback):
        assert script("Does it.", Example, str, words) == 2
        err = capsys.readouterr().err
        assert "error: unknown key 'nme'" in err
        assert ("Traceback" in err) == traceback


class TestSettings:
    def test_words_become_typed_values(self):
        words = ["name=7up", "size=64", "ratio=0.5", "places=[a,b]", "more.b=2"]
        found, passed = parse(Example, words)
        assert found == Example(name="7up", size=64, ratio=0.5, places=["a", "b"], more={"a": 1, "b": 2})
        assert passed == {}

    @pytest.mark.parametrize("text", ["1e-3", "1E-3", ".001", "0.001"])
    def test_numbers_are_numbers_however_they_are_written(self, text):
        assert parse(Example, ["name=a", f"lr0={text}"], passed_on=["lr0"])[1] == {"lr0": 0.001}

    def test_values_may_hold_equals_signs(self):
        assert parse(Example, ["name=a=b"])[0].name == "a=b"

    def test_defaults_are_not_shared(self):
        parse(Example, ["name=a"])[0].places.append("there")
        assert parse(Example, ["name=a"])[0].places == ["here"]

    def test_keys_of_the_host_are_handed_back_as_yaml_values(self):
        _, passed = parse(
            Example, ["name=a", "lr0=1e-2", "cos_lr=true", "classes=[0,2]"], passed_on=["lr0", "cos_lr", "classes"]
        )
        assert passed == {"lr0": 0.01, "cos_lr": True, "classes": [0, 2]}

    def test_own_keys_win_over_those_of_the_host(self):
        assert parse(Example, ["name=a", "size=32"], passed_on=["size"]) == (Example(name="a", size=32), {})

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["size=32"], "'name=' is required"),
            (["name=a", "size=big"], "size: Value 'big'"),
            (["name=a", "ratio=half"], "ratio: Value 'half'"),
            (["name=a", "places=here"], "places: one value where a list is needed"),
            (["name=a", "sise=3"], "unknown key 'sise'\n  expected: 'size'?"),
            (["name=a", "zzz=3"], "unknown key 'zzz'\n  expected: one of: more, name, places, ratio, size"),
            (["name=a", "size"], "argument 'size'"),
            (["name=a", "=3"], "argument '=3'"),
            (["name="], "argument 'name='"),
            (["name=a", "size=["], r"size=\["),
            (["name=a", "size.px=3"], "size: "),
            (["name=${size"], "name"),
        ],
    )
    def test_wrong_words(self, words, message):
        with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
            parse(Example, words)

    def test_yaml_and_words_over_it(self, tmp_path):
        path = tmp_path / "s.yaml"
        path.write_text("name: a\nsize: 32\nmore: {b: {c: 1, d: 2}}\nratio: 1e-1\n")
        found = load(Example, path, ["size=96", "more.b.c=5", "more.e=[1e-3]"])
        assert found == Example(name="a", size=96, ratio=0.1, more={"a": 1, "b": {"c": 5, "d": 2}, "e": [0.001]})
        assert type(found.more) is dict

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("name: a\nsise: 3\n", "unknown key 'sise'"),
            ("name: a\n3: 4\n", "unknown key '3'"),
            ("name: a\nsize: [1]\n", "size"),
            ("name: a\nsize: 2026-01-01\n", "size"),
            ("size: 3\n", "'name=' is required"),
            ("", "'name=' is required"),
            ("- name\n", "holds a list"),
            ("name: [\n", "cannot read"),
            ("name: \xff", "cannot read"),
        ],
    )
    def test_wrong_yaml(self, tmp_path, content, message):
        path = tmp_path / "s.yaml"
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=message):
            load(Example, path, [])

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("more", [], r"more: \[\]"),
            ("more", ["x"], "more: "),
            ("places", {"x": 1}, "places: "),
            ("places", [["x"]], r"\['x'\] inside a list"),
            ("places", ["x", {"y": 1}], "inside a list"),
        ],
    )
    def test_lists_and_mappings_are_not_mistaken(self, tmp_path, key, value, said):
        with pytest.raises(ConfigError, match=said):
            structured(Example, {"name": "a", key: value})
        (tmp_path / "s.yaml").write_text(json.dumps({"name": "a", key: value}))
        with pytest.raises(ConfigError, match=said):
            load(Example, tmp_path / "s.yaml", [])

    def test_later_values_override_earlier_ones(self):
        assert structured(Example, {"name": "a", "size": 1}, {"size": 2}).size == 2

    def test_description_shows_defaults_and_units(self):
        assert describe(Example)[:3] == [
            ("name", "required", "a name"),
            ("size", "640 px", "a size"),
            ("ratio", "not set", "a ratio"),
        ]

    def test_known_keys_pass(self):
        assert require_known(["a", "b.c"], ["a", "b"]) is None


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_configurations_that_we_ship_are_complete_but_for_places(command, path, tiny_data, tmp_path):
    """Their keys and values are right: what is refused is the folder, the last thing that is looked at."""
    (tmp_path / "mine.txt").write_text("mine")
    model = save_as_host(lively("yolov8n"), tmp_path / "dense.pt")
    words = [f"data={tiny_data}", f"out={tmp_path}"]
    words += [] if "model" in (yaml.safe_load(path.read_text()) or {}) else [f"model={model}"]
    outcome = command("run", path, *words)
    assert outcome.code == 2
    assert "is not empty and holds no run" in outcome.err
