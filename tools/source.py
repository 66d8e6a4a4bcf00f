"""Python source without what changes nothing, and the hash of the engine's: by it a record knows what it is of."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ENGINE = ("channels", "allocation/constraints.py", "allocation/coupled.py", "allocation/ladders.py", "surgery/apply.py",
          "surgery/copying.py", "surgery/mask.py", "surgery/verify.py", "hosts/ultralytics/blocks.py",
          "hosts/ultralytics/surgery.py")  # fmt: skip
"""The code that decides what can be pruned and how, and the proof."""


class _WithoutText(ast.NodeTransformer):
    """Drops strings that stand alone."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:  # ast's name
        """Drop a docstring."""
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def code_of(source: str | bytes) -> ast.AST:
    """Return the syntax tree of source without its comments and docstrings."""
    tree: ast.AST = _WithoutText().visit(ast.parse(source))
    return tree


@functools.cache
def engine_hash() -> str:
    """Return a hash of the code that decides what is pruned and how, without its comments and docstrings."""
    digest = hashlib.sha256()
    for place in ENGINE:
        path = ROOT / "yolo_prune" / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(ast.dump(code_of(file.read_bytes())).encode())
    return digest.hexdigest()[:12]
