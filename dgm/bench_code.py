"""The code that a suite's numbers depend on, as fingerprints that comments and formatting do not change.

Of a suite: the definitions of its own folder that its `run` reaches by name, followed through imports between the files
of that folder. Code that only the report uses is not among them, so a new caption recomputes nothing. Of the library:
all of its files; that fingerprint is kept beside each result and a difference is told, but it is no part of the key.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

__all__ = ["library", "reached"]


def reached(run: Callable[..., Any]) -> str:
    """Fingerprint of the definitions that a function reaches in the files of its folder.

    A definition is reached by its name; statements of a file that define nothing, and definitions under a decorator
    of the folder's own (it may register them), are reached with the file.

    >>> len(reached(reached))
    16
    """
    while isinstance(run, partial):
        run = run.func
    run = inspect.unwrap(run)
    file = inspect.getsourcefile(run)
    if file is None:
        return hashlib.sha256(repr(run).encode()).hexdigest()[:16]
    start = Path(file).resolve()
    files: dict[str, _File] = {}
    found: dict[tuple[str, str], str] = {}
    waiting = [(start.stem, run.__qualname__.partition(".")[0])]
    while waiting:
        module, name = waiting.pop()
        if (module, name) in found:
            continue
        if module not in files:
            files[module] = _File(start.with_name(f"{module}.py"))
            waiting += [(module, always) for always in files[module].always]
        nodes = files[module].defined.get(name, [])
        found[module, name] = "\n".join(ast.unparse(_bare(node)) for node in nodes)
        for node in nodes:
            waiting += files[module].uses(node)
    text = "\n".join(
        f"{'' if module == start.stem else module}.{name}\n{code}"
        for (module, name), code in sorted(found.items())
        if code
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _File:
    """The definitions and imports of a file."""

    def __init__(self, path: Path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.folder = path.parent
        self.module = path.stem
        self.defined: dict[str, list[ast.stmt]] = {}
        self.imported: dict[str, tuple[str, str | None]] = {}
        self.always: list[str] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                self._import(node)
        for statement in tree.body:
            names = list(_names(statement))
            if not names and not isinstance(statement, (ast.Import, ast.ImportFrom)) and not _no_part(statement):
                names = [f"<{hashlib.sha256(ast.unparse(statement).encode()).hexdigest()[:8]}>"]  # wherever it stands
                self.always.append(names[0])
            for name in names:
                self.defined.setdefault(name, []).append(statement)
        for name, statements in self.defined.items():
            decorators = [d for s in statements for d in getattr(s, "decorator_list", [])]
            roots = {n.id for d in decorators for n in ast.walk(d) if isinstance(n, ast.Name)}
            if any(root in self.defined or root in self.imported for root in roots):
                self.always.append(name)

    def _import(self, node: ast.ImportFrom) -> None:
        tail = (node.module or "").rpartition(".")[2]
        for alias in node.names:
            known = alias.asname or alias.name
            if tail and (self.folder / f"{tail}.py").is_file() and (node.level or node.module == tail or _near(node)):
                self.imported[known] = (tail, alias.name)
            elif (self.folder / f"{alias.name}.py").is_file() and (node.level or _near(node)):
                self.imported[known] = (alias.name, None)

    def uses(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        for part in _globals(node):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                module, name = self.imported.get(part.value.id, ("", ""))
                if module and name is None:
                    yield module, part.attr
            if isinstance(part, ast.Name):
                if part.id in self.defined:
                    yield self.module, part.id
                elif part.id in self.imported and (name := self.imported[part.id][1]) is not None:
                    yield self.imported[part.id][0], name


def _near(node: ast.ImportFrom) -> bool:
    return (node.module or "").startswith("dgm.benchmarks")


def _names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def _globals(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[ast.AST]:
    """The parts of a node, without names that a function binds for itself: its arguments and what it assigns to."""
    if isinstance(node, ast.Name) and node.id in local:
        return
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in local:
        return
    yield node
    inside = local
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        inside = local | _bound(node)
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        first = node.generators[0]
        yield from _globals(first.iter, local)
        targets = (n for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name))
        inside = local | {n.id for n in targets}
        for part in ast.iter_child_nodes(node):
            for own in ast.iter_child_nodes(part) if part is first else [part]:
                if own is not first.iter:
                    yield from _globals(own, inside)
        return
    for name, value in ast.iter_fields(node):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from _globals(part, inside if name == "body" else local)


def _bound(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> frozenset[str]:
    names, elsewhere, waiting = set(), set(), list(ast.iter_child_nodes(function))
    while waiting:
        part = waiting.pop()
        if isinstance(part, ast.arg):
            names.add(part.arg)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        elif isinstance(part, (ast.Global, ast.Nonlocal)):
            elsewhere.update(part.names)
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(part.name)
        elif not isinstance(part, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            waiting += ast.iter_child_nodes(part)  # what those bind is theirs
    return frozenset(names - elsewhere)


def _no_part(statement: ast.stmt) -> bool:
    """Whether an import runs nothing of it: text, and what a file does as a command."""
    return _is_text(statement) or (isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test))


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _bare(node: ast.stmt) -> ast.stmt:
    """Without docstrings."""
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and _is_text(part.body[0]):
            part.body = part.body[1:] or [ast.Pass()]
    return node


@cache
def library() -> str:
    """Fingerprint of the library, its models and guides: their lines but for comments and blank ones."""
    found = hashlib.sha256()
    for name in ("dgm", "dgm.models", "dgm.guides"):
        for folder in sorted(importlib.import_module(name).__path__):
            for path in sorted(Path(folder).glob("*.py")):
                if path.name.startswith(("bench", "cli", "commands")):
                    continue  # the runner itself, and words
                lines = (line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())
                kept = [line for line in lines if line and not line.lstrip().startswith("#")]
                found.update("\n".join([path.name, *kept]).encode())
    return found.hexdigest()[:16]
