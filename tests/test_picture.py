"""The picture of the channel graph: complete, self-contained, and safe whatever the layers are called."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import TOYS, act, build, conv

from yolo_prune.channels import ChannelGraph, trace
from yolo_prune.errors import OutputError
from yolo_prune.hosts.ultralytics.checkpoints import load_model
from yolo_prune.hosts.ultralytics.surgery import trace_model
from yolo_prune.pipeline.inspect import group_rows
from yolo_prune.pipeline.picture import picture_of
from yolo_prune.report.picture import Picture, render_picture, write_picture

VOID = {"meta", "input", "link", "br", "img"}


class Page(HTMLParser):
    """The elements of a page, and its bars: for each the (group, entries) of its segments."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.bars: list[list[tuple[int, int]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.elements.append((tag, values))
        classes = values.get("class", "").split()
        if "bar" in classes:
            self.bars.append([])
        if "segment" in classes:
            self.bars[-1].append((int(values["data-group"]), int(values["style"].removeprefix("flex-grow:"))))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [values for _, values in self.elements if name in values.get("class", "").split()]


def toy_picture(model: nn.Module, example: torch.Tensor | None = None) -> tuple[ChannelGraph, Picture]:
    graph = trace(model, torch.zeros(1, 3, 8, 8) if example is None else example)
    groups = group_rows(graph, imgsz_px=8)
    return graph, picture_of(model, graph, groups, title="toy", summary="a toy")


def axes_of(picture: Picture) -> dict[tuple[str, int], tuple[tuple[int, int], ...]]:
    """Return the segments of every axis of a picture; no axis may be shown twice."""
    bars = [bar for layer in picture.layers for box in layer.boxes for bar in box.bars]
    found = [(axis, bar.segments) for bar in bars for axis in bar.axes]
    assert len(dict(found)) == len(found)
    return dict(found)


def assert_complete(graph: ChannelGraph, picture: Picture) -> None:
    """Every entry of every axis stands in its place under its group."""
    axes = axes_of(picture)
    assert axes.keys() == graph.axes.keys()
    for key, axis in graph.axes.items():
        shown = [group for group, entries in axes[key] for _ in range(entries)]
        assert len(shown) == len(axis.channels)
        assert all(channel in graph.groups[group].channels for group, channel in zip(shown, axis.channels, strict=True))
        assert all(first[0] != second[0] for first, second in zip(axes[key], axes[key][1:], strict=False))


def assert_shows(page: Page, picture: Picture) -> None:
    """The page holds every group, layer, box and segment of the records."""
    boxes = [box for layer in picture.layers for box in layer.boxes]
    assert page.bars == [list(bar.segments) for box in boxes for bar in box.bars]
    assert len(page.of_class("box")) == len(boxes)
    rows = [int(values["data-group"]) for tag, values in page.elements if tag == "tr" and "data-group" in values]
    assert rows == list(range(len(picture.groups)))
    assert {"details-" + str(index) for index in rows} <= {values.get("id") for _, values in page.elements}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The graph, records and file of a stock model."""
    model = load_model("yolov8n.yaml")
    graph = trace_model(model)
    picture = picture_of(model, graph, group_rows(graph, imgsz_px=640), title="yolov8n.yaml", summary="4.37G MACs")
    path = tmp_path_factory.mktemp("picture") / "graph.html"
    write_picture(path, picture)
    return graph, picture, path.read_text(encoding="utf-8")


class TestRecords:
    @pytest.mark.parametrize("name", sorted(set(TOYS) - {"Perceptron", "SelfAttention"}))
    def test_toys_are_complete(self, name):
        assert_complete(*toy_picture(build(name)))

    def test_stock_model_is_complete(self, stock):
        assert_complete(*stock[:2])

    def test_layers_stand_in_the_order_of_the_model(self, stock):
        layers = stock[1].layers
        numbers = [int(layer.name.removeprefix("model.")) for layer in layers]
        assert numbers == sorted(numbers)
        assert [layer.kind for layer in layers[:3]] == ["Conv", "Conv", "C2f"]
        assert layers[-1].kind == "Detect"

    def test_a_norm_is_shown_with_the_layer_that_feeds_it(self):
        _, picture = toy_picture(build("Chain"))
        first = picture.layers[0].boxes[0]
        assert [(bar.kind, bar.size) for bar in first.bars] == [("out", 4), ("in", 3)]
        assert first.bars[0].axes[0] == ("a.weight", 0)
        assert ("norm.running_var", 0) in first.bars[0].axes
        assert first.shape == (4, 3, 3, 3)
        assert [layer.name for layer in picture.layers] == ["a", "b", "out"]

    def test_an_input_that_is_its_own_output_has_two_bars(self):
        _, picture = toy_picture(build("Shared"))
        box = next(layer.boxes[0] for layer in picture.layers if layer.name == "b")
        assert [bar.kind for bar in box.bars] == ["out", "in"]

    def test_a_channel_that_is_read_twice_takes_two_entries(self):
        graph, picture = toy_picture(build("Branches"))
        members = picture.groups[graph.group_names()["a"]].members
        assert {(m.tensor, m.dim): m.entries_per_channel for m in members} == {("a.weight", 0): 1, ("out.weight", 1): 2}

    def test_a_tensor_of_the_model_itself_has_a_layer(self):
        _, picture = toy_picture(build("Shifted"))
        assert any(box.name == "scale" and layer.kind == "Shifted" for layer in picture.layers for box in layer.boxes)


class TestPage:
    def test_stands_alone(self, stock):
        page = Page(stock[2])
        assert not re.search(r"https?://|@import|url\(", stock[2])
        for tag, values in page.elements:
            assert tag not in ("link", "img", "iframe", "object", "embed", "base")
            assert "src" not in values
            assert values.get("href", "#").startswith("#")
        assert any("default-src 'none'" in values.get("content", "") for tag, values in page.elements if tag == "meta")

    def test_shows_everything(self, stock):
        graph, picture, text = stock
        page = Page(text)
        assert_shows(page, picture)
        words = "".join(page.words)
        assert all(group.name in words for group in graph.groups)
        assert all(name in words for name, _ in graph.axes)
        assert all(group.lock in words for group in graph.groups)
        assert all(tie.where in words for tie in graph.ties)

    @pytest.mark.parametrize("name", ["Chain", "Chunked", "Grouped", "Straddling", "Shifted"])
    def test_shows_toys(self, name):
        _, picture = toy_picture(build(name))
        assert_shows(Page(render_picture(picture)), picture)

    def test_says_in_words_what_a_colour_says(self, stock):
        _, picture, text = stock
        for segment in Page(text).of_class("segment"):
            group = picture.groups[int(segment["data-group"])]
            assert group.state in segment["class"].split()
            assert segment["aria-label"].startswith(f"{group.name}: ")
            assert segment["aria-label"].endswith(group.state)

    def test_identifiers_are_unique_and_links_lead_to_them(self, stock):
        page = Page(stock[2])
        identifiers = [values["id"] for _, values in page.elements if "id" in values]
        assert len(set(identifiers)) == len(identifiers)
        assert {values["href"][1:] for _, values in page.elements if "href" in values} <= set(identifiers)

    def test_names_are_escaped(self):
        model = nn.Sequential()
        model.add_module("<script>", conv(3, 4))
        model.add_module("\"'><b onmouseover=alert(1)>&amp;", conv(4, 5))
        model.add_module("{{ 7 * 7 }}</script>", conv(5, 2))
        _, picture = toy_picture(model)
        text = render_picture(picture)
        page = Page(text)
        assert sum(tag == "script" for tag, _ in page.elements) == 1
        assert not any(tag == "b" or "onmouseover" in values for tag, values in page.elements)
        words = "".join(page.words)
        assert all(name in words for name in dict(model.named_modules()))
        assert_shows(page, picture)

    def test_is_written_once(self, tmp_path):
        _, picture = toy_picture(build("Chain"))
        write_picture(tmp_path / "new" / "graph.html", picture)
        with pytest.raises(OutputError, match="already exists"):
            write_picture(tmp_path / "new" / "graph.html", picture)

    def test_of_a_model_with_nothing_to_show(self):
        _, picture = toy_picture(nn.Sequential(nn.Identity()))
        assert_shows(Page(render_picture(picture)), picture)


class TestCommand:
    def test_writes_one_file(self, desk, command):
        outcome = command("inspect", "model=yolov8n.yaml", "picture=graph.html", "json=table.json")
        assert outcome.code == 0
        assert sorted(path.name for path in desk.iterdir()) == ["graph.html", "table.json"]
        assert "picture: graph.html" in outcome.out
        assert Page(Path("graph.html").read_text(encoding="utf-8")).of_class("segment")

    def test_existing_file_is_refused_before_any_work(self, desk, refused, monkeypatch):
        monkeypatch.setattr("yolo_prune.pipeline.inspect.load_model", pytest.fail)
        (desk / "taken.html").write_text("a year of work")
        assert "'taken.html' already exists" in refused("inspect", "model=yolov8n.yaml", "picture=taken.html")

    @pytest.mark.parametrize("other", ["graph.html", "./graph.html", "absent/../graph.html"])
    def test_one_file_for_two_outputs_is_refused(self, refused, other):
        message = refused("inspect", "model=yolov8n.yaml", "picture=graph.html", f"json={other}")
        assert "the same path" in message
        assert "picture= and json=" in message

    def test_below_a_file_is_refused(self, desk, refused):
        (desk / "file").write_text("mine")
        assert "cannot write" in refused("inspect", "model=yolov8n.yaml", "picture=file/graph.html")


def test_the_table_says_of_every_group_why_it_is_locked_or_tied(command):
    shown = command("inspect", "model=yolo11n.yaml").out
    notes = dict(re.findall(r"^((?:locked|tied) \d+): (.+)$", shown, flags=re.MULTILINE))
    assert notes["tied 1"] == "equal split in model.2"
    assert "reaches the model's output" in " ".join(notes.values())
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith("model.")}
    assert "tied 1 " in rows["model.2.cv1.conv#1"]
    states = [re.search(r" (free|locked \d+|tied \d+(?:, \d+)*) ", line)[1] for line in rows.values()]
    named = {f"{state.split()[0]} {number}" for state in states for number in re.findall(r"\d+", state)}
    assert named == set(notes)  # each reason belongs to a row


class Softened(nn.Module):
    """An operator without a rule touches a (free otherwise) or only what leaves the model anyway."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.inside, self.a, self.out = inside, conv(3, 4), conv(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = act(self.a(x))
        out = self.out(a.cumsum(1) if self.inside else a)
        return out, out.cumsum(1)


class TestOperatorsWithoutRule:
    @pytest.mark.parametrize("inside", [False, True])
    def test_are_harmless_only_where_every_channel_leaves_the_model(self, inside):
        report = trace(Softened(inside=inside).eval(), torch.zeros(1, 3, 8, 8)).report
        assert report.operators_without_rule == {"aten.cumsum": 2 if inside else 1}
        assert report.operators_at_outputs == (() if inside else ("aten.cumsum",))

    def test_are_said_to_be_in_words(self, command):
        out = command("inspect", "model=yolov8n.yaml").out
        assert "no rule: aten._softmax (calls: 1), but it touched only channels that reach the model's output" in out
