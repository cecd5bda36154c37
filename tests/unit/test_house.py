"""The house rules that no linter knows: how long a file and a function may be."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE_LINES = 400
BODY_LINES = 40


def _sources() -> list[Path]:
    return [*(ROOT / "mesh").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        body = body[1:] if isinstance(first.value.value, str) else body
    if not body:
        return 0
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in _sources()}

    too_long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > FILE_LINES}

    assert lengths
    assert too_long == {}


def test_no_function_body_is_longer_than_40_lines() -> None:
    bodies = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": _body_lines(node)
        for path in _sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }

    too_long = {where: lines for where, lines in bodies.items() if lines > BODY_LINES}

    assert bodies
    assert too_long == {}


def test_every_module_says_what_it_owns() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "mesh").rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]

    assert silent == []
