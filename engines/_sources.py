"""The files of kernels/ as definitions that refer to each other: what extract.py picks from.

    source = Source.read(path)
    source.definitions["rms_norm"]      the statements that bind it, with the comments above
    references(statement)               the names of its module that a statement uses, and where

A name is one of the module's own definitions, comes from a neighbour, or from a foreign import;
names that a function, a comprehension or a class binds are its own.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Reference", "Source", "references"]

PACKAGE = "llama4_triton.kernels."
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file: its text, its top-level definitions and where its other names come from."""

    name: str  # of the module, without its package
    text: str
    docstring: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    neighbours: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # module, its name
    foreign: dict[str, str] = field(default_factory=dict)  # the statement that imports it
    before: list[str] = field(default_factory=list)  # modules that are imported at run time

    @classmethod
    def read(cls, path: Path) -> Source:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        source = cls(name=path.stem, text=text, docstring=ast.get_docstring(tree) or "")
        for statement in tree.body:
            source._add(statement)
        return source

    def _add(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                written = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                self.foreign[alias.asname or alias.name.partition(".")[0]] = written
        elif isinstance(statement, ast.ImportFrom):
            self._add_from(statement, run_time=True)
        elif isinstance(statement, ast.If):  # TYPE_CHECKING
            for inner in statement.body:
                if isinstance(inner, ast.ImportFrom):
                    self._add_from(inner, run_time=False)
        else:
            for name in _bound([statement]):
                self.definitions.setdefault(name, []).append(statement)

    def _add_from(self, statement: ast.ImportFrom, *, run_time: bool) -> None:
        module = statement.module or ""
        inside = statement.level == 1 or module.startswith(PACKAGE)
        module = module.removeprefix(PACKAGE)
        for alias in statement.names:
            name = alias.asname or alias.name
            if not inside:
                self.foreign[name] = f"from {module} import {alias.name}"
                continue
            self.neighbours[name] = (module, alias.name) if module else (alias.name, None)
            if run_time:
                self.before.append(self.neighbours[name][0])

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines(keepends=True)

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(map(len, self.lines))]

    def offset(self, line: int | None, column: int | None) -> int:
        """Where in the text a position of the syntax tree is; the sources are ASCII."""
        return self._starts[(line or 1) - 1] + (column or 0)

    def span(self, node: ast.expr | ast.keyword) -> tuple[int, int]:
        """Where `node` begins and ends in the text."""
        begin = self.offset(node.lineno, node.col_offset)
        return begin, self.offset(node.end_lineno, node.end_col_offset)

    def first_line(self, statement: ast.stmt) -> int:
        """The line, from 1, of its decorators or of the comment directly above it."""
        decorators = getattr(statement, "decorator_list", [])
        line = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
        while line > 1 and self.lines[line - 2].startswith("#"):
            line -= 1
        return line


@dataclass(frozen=True)
class Reference:
    """A name of the module that is read at a place, `attribute` of it where it has a dot."""

    node: ast.Name
    name: str
    attribute: ast.Attribute | None
    hidden: frozenset[str]  # names that are local at this place


def references(statement: ast.stmt) -> list[Reference]:
    """Names that `statement` reads or writes and does not bind in a scope of its own."""
    visitor = _References()
    visitor.visit(statement)
    return visitor.found


class _References(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[Reference] = []
        self._scopes: list[tuple[type[ast.AST], set[str]]] = []

    def visit_Name(self, node: ast.Name) -> None:
        self._refer(node, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            self._refer(node.value, node)
        else:
            self.generic_visit(node)

    def _refer(self, node: ast.Name, attribute: ast.Attribute | None) -> None:
        inner = len(self._scopes) - 1
        # A class's names are not seen by the functions in it.
        visible = [
            names for i, (kind, names) in enumerate(self._scopes)
            if kind is not ast.ClassDef or i == inner
        ]  # fmt: skip
        hidden = frozenset[str]().union(*visible)
        if node.id not in hidden:
            self.found.append(Reference(node, node.id, attribute, hidden))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for outside in (*node.decorator_list, *_around(node.args), node.returns):
            if outside is not None:
                self.visit(outside)
        with self._scope(ast.FunctionDef, _arguments(node.args) | set(_bound(node.body))):
            for statement in node.body:
                self.visit(statement)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for outside in _around(node.args):
            self.visit(outside)
        with self._scope(ast.Lambda, _arguments(node.args)):
            self.visit(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for outside in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(outside)
        with self._scope(ast.ClassDef, set(_bound(node.body))):
            for statement in node.body:
                self.visit(statement)

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    ) -> None:
        self.visit(node.generators[0].iter)  # evaluated outside
        targets = {
            name.id
            for generator in node.generators
            for name in ast.walk(generator.target)
            if isinstance(name, ast.Name)
        }
        with self._scope(type(node), targets):
            for i, generator in enumerate(node.generators):
                for inside in (*generator.ifs, *([generator.iter] if i else [])):
                    self.visit(inside)
            elements = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
            for element in elements:
                self.visit(element)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    @contextmanager
    def _scope(self, kind: type[ast.AST], names: set[str]) -> Iterator[None]:
        self._scopes.append((kind, names))
        yield
        self._scopes.pop()


def _around(arguments: ast.arguments) -> Iterator[ast.expr]:
    """Annotations and defaults, which are evaluated outside of the function."""
    for argument in _every(arguments):
        if argument.annotation is not None:
            yield argument.annotation
    yield from (d for d in (*arguments.defaults, *arguments.kw_defaults) if d is not None)


def _every(arguments: ast.arguments) -> list[ast.arg]:
    rest = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest]


def _arguments(arguments: ast.arguments) -> set[str]:
    return {argument.arg for argument in _every(arguments)}


def _bound(statements: list[ast.stmt]) -> Iterator[str]:
    """Names that statements bind, not those that functions and classes in them bind."""
    nodes: list[ast.AST] = list(statements)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
            continue
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.ExceptHandler) and node.name:
                yield node.name
            nodes += ast.iter_child_nodes(node)
