"""Where the classic code is, and whether it is a version that our hooks fit: looked at before any of it runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_prune.errors import ConfigError
from yolo_prune.hosts.yolov5.shims import adapt_numpy, adapt_pillow, stand_ins

NEEDED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "train.py": {
        "train": ("hyp", "opt", "device", "callbacks"),
        "main": ("opt", "callbacks"),
        "parse_opt": ("known",),
        "Callbacks": (),
        "Model": (),
        "ModelEMA": (),
        "smart_optimizer": (),
    },
    "utils/torch_utils.py": {
        "smart_optimizer": ("model", "name", "lr", "momentum", "decay"),
        "ModelEMA.__init__": ("self", "model"),
        "ModelEMA.update": ("self", "model"),
    },
    "models/yolo.py": {
        "Detect": (),
        "Segment": (),
        "DetectionModel.__init__": ("self", "cfg", "ch", "nc", "anchors"),
    },
}
"""What we hook: names by file, with the first arguments of functions. v7.0 was the first to have all of it."""

REMEDIES = {"pkg_resources": "pip install 'setuptools<81'", "git": "pip install gitpython"}
"""What to install for a module that is missing, where its package is called otherwise."""


@dataclass(frozen=True)
class Classic:
    """The classic code that is used.

    Attributes:
        root: Folder with train.py.
        prefix: What stands before `models` and `utils` in its imports: nothing for a repository, `yolov5.` for PyPI's.
    """

    root: Path
    prefix: str

    def module(self, name: str) -> Any:
        """Import one of its modules, such as `models.yolo`.

        Raises:
            ConfigError: It cannot be imported, or another `models` or `utils` was imported before.
        """
        if not self.prefix and str(self.root) not in sys.path:
            sys.path.insert(0, str(self.root))
        adapt_numpy()
        adapt_pillow()
        try:
            with stand_ins():
                module = importlib.import_module(self.prefix + name)
        except ImportError as error:
            raise self._cannot_import(name, error) from error
        if not Path(str(module.__file__)).resolve().is_relative_to(self.root):
            raise ConfigError(
                f"'{self.prefix}{name}' is '{module.__file__}'",
                expected=f"the one of '{self.root}'",
                remedy="start a new process for each copy of YOLOv5; take other `models` and `utils` off PYTHONPATH",
            )
        return module

    def _cannot_import(self, name: str, error: ImportError) -> ConfigError:
        missing = (error.name or "").partition(".")[0]
        install = REMEDIES.get(missing, f"pip install {missing}") if missing else "see its requirements.txt"
        return ConfigError(
            f"YOLOv5's '{name}' cannot be imported: {error}",
            expected=f"an environment in which '{self.root / 'train.py'}' runs",
            remedy=install if isinstance(error, ModuleNotFoundError) else "see its requirements.txt",
        )


def repository(path: Path) -> Classic:
    """Return the code of a clone of the classic repository.

    Raises:
        ConfigError: No such folder, no train.py in it, or a version that is not known.
    """
    if not (path / "train.py").is_file():
        found = "no file" if path.is_dir() else "no folder"
        raise ConfigError(
            f"{found} '{path / 'train.py' if path.is_dir() else path}'",
            expected="--repo: the folder of a clone of github.com/ultralytics/yolov5, with train.py in it",
            remedy="check the path, or pass --pypi to use the installed package `yolov5`",
        )
    return _known(Classic(path.resolve(), ""))


def installed() -> Classic:
    """Return the code of PyPI's package `yolov5`.

    Raises:
        ConfigError: It is not installed, or a version that is not known.
    """
    found = importlib.util.find_spec("yolov5")
    if found is None or found.origin is None:
        raise ConfigError(
            "package 'yolov5' is not installed",
            expected="PyPI's yolov5, tested with 7.0.14",
            remedy="pip install --no-deps yolov5==7.0.14 pandas seaborn 'setuptools<81', or pass --repo",
        )
    return _known(Classic(Path(found.origin).resolve().parent, "yolov5."))


def _known(classic: Classic) -> Classic:
    """Refuse a version whose functions are not those that we hook; nothing of it is run to find out."""
    missing = [
        f"{file}: {name}({', '.join(arguments)})" if arguments else f"{file}: {name}"
        for file, names in NEEDED.items()
        for name, arguments in names.items()
        if (found := _names_in(classic.root / file).get(name)) is None or found[: len(arguments)] != arguments
    ]
    if missing:
        raise ConfigError(
            f"'{classic.root}' is no version of YOLOv5 that is known: {len(missing)} of the names that are hooked are "
            f"missing or take other arguments: {'; '.join(missing)}",
            expected="YOLOv5 v7.0 or newer, or PyPI's yolov5 7.0.14",
            remedy="check out a newer version of the repository",
        )
    return classic


def _names_in(file: Path) -> dict[str, tuple[str, ...]]:
    """Return the names that a file defines or imports, methods as Class.method, functions with their arguments."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return {}
    return dict(_named(tree.body))


def _named(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, tuple(argument.arg for argument in node.args.args)
        elif isinstance(node, ast.ClassDef):
            yield node.name, ()
            yield from _named(node.body, f"{node.name}.")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name, ()) for alias in node.names)
