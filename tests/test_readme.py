"""What README says is so: its tables come from the records, its commands are understood, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from readme_tables import filled

from yolo_prune.cli import VERBS
from yolo_prune.configuration import load, parse
from yolo_prune.hosts.ultralytics.trainer import stock_keys

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every `yolo-prune` command of the shell blocks, as words; an open one (`...`) is none."""
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("yolo-prune ")]
    return [words[1:] for words in found if "..." not in words]


def test_tables_are_those_of_the_records() -> None:
    assert filled(TEXT) == TEXT, "run python tools/readme_tables.py"


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_understood(words: list[str]) -> None:
    verb = VERBS[words[0]]
    if verb.flags:
        verb.load()[1](words[1:])
        return
    schema, _ = verb.load()
    if verb.file_first:
        load(schema, ROOT / words[1], words[2:])
    else:
        parse(schema, words[1:], **({"passed_on": stock_keys()} if verb.passes_on else {}))


def test_commands_in_a_row_of_text_name_keys_that_there_are() -> None:
    """Such as `prune criterion=taylor`, of which only a part is shown."""
    shown = [words.split() for words in re.findall(r"`([a-z]+(?: [a-z_.]+=[^` ]+)+)`", TEXT)]
    assert len(shown) >= 10
    for verb, *words in shown:
        if verb not in VERBS or VERBS[verb].flags:
            continue
        schema, _ = VERBS[verb].load()
        known = set(schema.__dataclass_fields__) | (set(stock_keys()) if VERBS[verb].passes_on else set())
        for word in words:
            assert word.partition("=")[0].partition(".")[0] in known, f"{verb} {word}"


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    places = [link for link in links if "://" not in link]
    assert places
    assert [place for place in places if not (ROOT / place).exists()] == []
