"""Runtimes tell nobody what is run, unless the user wants it; the processes themselves are in test_bundle_alone.py."""

from __future__ import annotations

import os
import sys
import types

import pytest

from yolo_prune.device.runtimes import telemetry
from yolo_prune.device.runtimes.base import import_runtime

NAME = telemetry._TELLING


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_what_the_user_has_set_stays(monkeypatch, before, after):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")  # so that it is put back
    if before is None:
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    import_runtime("json", purpose="test")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == after


def test_the_package_can_be_imported_by_others_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with telemetry.without_telemetry(), pytest.raises(ModuleNotFoundError):
        __import__(NAME)
    assert NAME not in sys.modules


def test_what_is_imported_already_stays(monkeypatch):
    module = types.ModuleType(NAME)
    monkeypatch.setitem(sys.modules, NAME, module)
    import_runtime("json", purpose="test")
    assert sys.modules[NAME] is module
