"""Python source without what changes nothing: comments and docstrings."""

from __future__ import annotations

import ast


class _WithoutText(ast.NodeTransformer):
    """Drops strings that stand alone."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:  # ast's name
        """Drop a docstring."""
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def code_of(source: str | bytes) -> ast.AST:
    """Return the syntax tree of source without its comments and docstrings."""
    tree: ast.AST = _WithoutText().visit(ast.parse(source))
    return tree
