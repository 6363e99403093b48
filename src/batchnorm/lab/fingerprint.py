"""What an experiment is made of, as one short word: trials of another make are not mixed in."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
from collections.abc import Iterator

from batchnorm.lab.claim import AnyClaim

__all__ = ["fingerprint"]

_ROOM = "batchnorm.lab"
_SHOWN = (f"{_ROOM}.figures", f"{_ROOM}.claim")  # what draws and describes measures nothing
_IDLE = ("ctx", "kind", "lineno", "type_comment", "type_params")


def fingerprint(claim: type[AnyClaim]) -> str:
    """Twelve hexadecimal digits of the claim's code and of what it uses of the laboratory's.

    Comments, docstrings, layout, the source and the claim's figure do not count; its hypotheses do,
    so that a bar that is moved after the run is seen. The library's layers, repairs and rules do
    not: a record names the version instead.
    """
    digest = hashlib.sha256()
    for name in sorted(_reached(claim.__module__)):
        digest.update(f"{name}:{_bare(_tree(name))}\n".encode())
    return digest.hexdigest()[:12]


def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def _reached(start: str) -> set[str]:
    """The modules of the laboratory that one imports, and those that they import."""
    found, waiting = set[str](), [start]
    while waiting:
        name = waiting.pop()
        if name not in found and name not in _SHOWN:
            found.add(name)
            waiting.extend(_imported(name))
    return found


def _imported(module: str) -> Iterator[str]:
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_ROOM):
            assert node.module is not None
            origin = importlib.import_module(node.module)
            for alias in node.names:
                # a package only passes on what one of its modules defines
                defined = getattr(getattr(origin, alias.name), "__module__", node.module)
                yield defined if str(defined).startswith(_ROOM) else node.module


def _bare(node: ast.AST) -> str:
    """The tree in one line, the same for every version of Python."""
    parts = []
    for name, value in ast.iter_fields(node):
        if name in _IDLE or value is None or value == []:
            continue
        items = value if isinstance(value, list) else [value]
        kept = [
            _bare(item) if isinstance(item, ast.AST) else repr(item)
            for item in items
            if not _is_shown(item)
        ]
        parts.append(f"{name}={' '.join(kept)}")
    return f"{type(node).__name__}({', '.join(parts)})"


def _is_shown(node: object) -> bool:
    """A docstring, a citation, or what draws the figure."""
    if isinstance(node, ast.FunctionDef):
        return node.name == "figure"
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets] == ["source"]
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
