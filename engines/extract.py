"""One operator as one file that needs torch and Triton only.

    llama4-triton extract rms_norm --out rms_norm.py

The definitions that the operator's public function reaches are copied as they stand in kernels/,
docstrings and comments included, neighbours before those that import them. What changes:

* a flat operator, `_x = define("x(...)", _x_impl, fake)`, is its implementation: no torch.ops;
* kernels lose their names and costs for profilers: `**named(...)` in the decorator;
* launch, paths, selftest features and debugging are those of stand_ins.py;
* a name that two files define gets its file's name in front, but for the operator's own.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama4_triton import __version__
from llama4_triton.kernels._paths import OPS

from ._sources import Reference, Source, references

__all__ = ["extract"]

KERNELS = Path(__file__).parents[1] / "kernels"
STAND_INS = Path(__file__).with_name("stand_ins.py")
REPLACED = ("_launch", "_paths", "_debug")  # files some of whose definitions stand_ins.py has

# Operators that are an argument of another function, and what must come along to call one.
PUBLIC = {"add_rms_norm_quantize": "rms_norm_quantize"}
COMPANIONS = {
    "grouped_gemm_swiglu": ("sort_by_expert",),
    "grouped_gemm_combine": ("sort_by_expert",),
}

HEADER = '''"""{functions} of llama4-triton {version} in one file, for torch and Triton alone.

Written by `llama4-triton extract {op}`; licence Apache-2.0. For NVIDIA GPUs and inference.
With TRITON_INTERPRET=1 it runs on the CPU in fp32 and fp16: Triton's interpreter computes bf16 and
fp8 wrongly, so they are refused there. Files that comments name are those of llama4-triton.
"""

from __future__ import annotations

'''

Key = tuple[str, str]  # a file of kernels/ and a name that it defines


def extract(op: str) -> str:
    """Return the source of one file with the operator `op`, its kernels, configuration and checks.

    Raises:
        ValueError: there is no such operator.
    """
    if op not in OPS:
        raise ValueError(f"extract: OP must be one of {', '.join(sorted(OPS))}, got {op!r}")
    kept = _Kept([PUBLIC.get(op, op), *COMPANIONS.get(op, ())])
    functions = " and ".join(f"`{name}`" for _, name in kept.roots)
    return HEADER.format(functions=functions, version=__version__, op=op) + kept.text()


class _Kept:
    """The definitions that `functions` reach, what they are called, and their text."""

    def __init__(self, functions: list[str]) -> None:
        self.sources = {path.stem: _read(path) for path in (*KERNELS.glob("*.py"), STAND_INS)}
        self.stand_ins = self.sources[STAND_INS.stem]
        self.roots = [self._public(name) for name in functions]
        self.foreign: set[str] = set()
        self.reached: dict[Key, list[ast.stmt]] = {}
        self._reach(self.roots)
        self.final = self._names()

    def _public(self, name: str) -> Key:
        """Where the operator's function is: not in reference.py, and no kernel."""
        for module, source in self.sources.items():
            if module != "reference" and name in source.definitions:
                if "_library" in source.before:
                    return module, name
        raise ValueError(f"extract: {name} must be a function of kernels/")

    def _reach(self, roots: Iterable[Key]) -> None:
        waiting = list(roots)
        while waiting:
            key = waiting.pop()
            if key in self.reached:
                continue
            module, name = key
            self.reached[key] = self.sources[module].definitions[name]
            for statement in self.reached[key]:
                for reference in _live_references(statement):
                    target = self.resolve(module, reference.name, reference.attribute)
                    if target is not None:
                        waiting.append(target)
                    elif reference.name in self.sources[module].foreign:
                        self.foreign.add(self.sources[module].foreign[reference.name])

    def resolve(self, module: str, name: str, attribute: ast.Attribute | None) -> Key | None:
        """What `name`, or name.attribute where it is a module, stands for; None if foreign."""
        source = self.sources[module]
        if name in source.neighbours:
            module, original = source.neighbours[name]
            if original is None:
                if attribute is None:
                    raise NotImplementedError(f"extract: module {name} is used as a value")
                original = attribute.attr
            return self.resolve(module, original, None)
        if name not in source.definitions:
            return None
        if module in REPLACED and name in self.stand_ins.definitions:
            return self.stand_ins.name, name
        implementation = _implementation(source.definitions[name][0])
        return (module, name) if implementation is None else (module, implementation)

    def _names(self) -> dict[Key, str]:
        """What each definition is called: its name, with that of its file where others have it."""
        used: dict[str, list[Key]] = {}
        for key in self.reached:
            used.setdefault(key[1], []).append(key)
        apart = {k for keys in used.values() if not self._are_one(keys) for k in keys}
        renamed = {key for key in apart if key[0] != self.roots[0][0]} | self._shadowed()
        imported = {line.split()[-1] for line in self.foreign}
        renamed |= {key for key in self.reached if key[1] in imported}
        return {key: _prefixed(*key) if key in renamed else key[1] for key in self.reached}

    def _are_one(self, keys: list[Key]) -> bool:
        """Whether equal names are equal constants: E4M3 = torch.float8_e4m3fn."""
        found = [(module, s) for module, name in keys for s in self.reached[module, name]]
        refer = (self._targets(module, statement) for module, statement in found)
        equal = len({ast.unparse(statement) for _, statement in found}) == 1
        return len(keys) == 1 or (equal and not any(map(set, refer)))

    def _targets(self, module: str, statement: ast.stmt) -> Iterator[Key]:
        """The other definitions that `statement` refers to."""
        for reference in _live_references(statement):
            key = self.resolve(module, reference.name, reference.attribute)
            if key is not None and statement not in self.reached[key]:
                yield key

    def _shadowed(self) -> set[Key]:
        """Definitions that would be hidden by a local name where they are used."""
        hidden = set()
        for (module, _), statements in self.reached.items():
            for reference in itertools.chain(*map(_live_references, statements)):
                key = self.resolve(module, reference.name, reference.attribute)
                if key is not None and key[1] in reference.hidden:
                    hidden.add(key)
        return hidden

    def text(self) -> str:
        """Imports, and the definitions of each file under what its docstring says."""
        parts = [_imports(self.foreign)]
        written: dict[str, Key] = {}  # one of several equal constants is enough
        for module in self._order():
            here = [key for key in self.reached if key[0] == module]
            here = [key for key in here if written.setdefault(self.final[key], key) == key]
            if not here:
                continue
            source = self.sources[module]
            parts.append(_heading(source))
            found = [(s.lineno, name, s) for _, name in here for s in self.reached[module, name]]
            before: ast.stmt | None = None
            for _, name, statement in sorted(found, key=lambda entry: entry[0]):
                parts += [_gap(before, statement), self._statement(source, name, statement)]
                before = statement
        return "".join(parts)

    def _order(self) -> list[str]:
        """Files after those that they import, and the stand-ins where launch() was."""
        order: list[str] = []

        def add(module: str) -> None:
            if module not in order:
                for other in self.sources[module].before:
                    add(other)
                order.append(module)

        for module, _ in self.roots:
            add(module)
        order.insert(order.index("_launch") + 1, self.stand_ins.name)
        return order

    def _statement(self, source: Source, name: str, statement: ast.stmt) -> str:
        """The lines of `statement` with what it refers to under its final name."""
        edits = [(*span, "") for span in _profile_spans(source, statement)]
        for reference in _live_references(statement):
            key = self.resolve(source.name, reference.name, reference.attribute)
            if key is None:
                continue
            is_module = source.neighbours.get(reference.name, ("", ""))[1] is None
            node = (reference.attribute if is_module else None) or reference.node
            if ast.unparse(node) != self.final[key]:
                edits.append((*source.span(node), self.final[key]))
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            begin = source.text.index(name, source.offset(statement.lineno, 0))
            edits.append((begin, begin + len(name), self.final[source.name, name]))
        end = source.offset((statement.end_lineno or 0) + 1, 0)
        text = ""
        for first, last, new in sorted(edits, reverse=True):
            text = new + source.text[last:end] + text
            end = first
        return source.text[source.offset(source.first_line(statement), 0) : end] + text


@functools.cache
def _read(path: Path) -> Source:
    return Source.read(path)


def _prefixed(module: str, name: str) -> str:
    """rms_norm, _flat: _rms_norm_flat."""
    bare = module.strip("_")
    if name.isupper():
        return f"{bare.upper()}_{name}"
    return f"{'_' * name.startswith('_')}{bare}_{name.strip('_')}"


def _implementation(statement: ast.stmt) -> str | None:
    """The implementation's name in `flat = define(schema, implementation, fake)`."""
    value = getattr(statement, "value", None)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        implementation = value.args[1] if value.func.id == "define" else None
        if isinstance(implementation, ast.Name):
            return implementation.id
    return None


def _profiles(statement: ast.stmt) -> Iterator[tuple[ast.Call, ast.keyword]]:
    """The `**named(...)` of its decorators: what a profiler shows of a kernel."""
    for decorator in getattr(statement, "decorator_list", []):
        for keyword in getattr(decorator, "keywords", []):
            if keyword.arg is None and ast.unparse(keyword.value).startswith("named("):
                yield decorator, keyword


def _profile_spans(source: Source, statement: ast.stmt) -> Iterator[tuple[int, int]]:
    """Where they are in the text: with the comma before, or all arguments where it is the only."""
    for call, keyword in _profiles(statement):
        given: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
        given.remove(keyword)
        before = [source.span(node)[1] for node in given]
        begin, end = source.span(keyword)
        if given:
            yield max(before), end
        else:
            yield source.span(call.func)[1], source.span(call)[1]


def _live_references(statement: ast.stmt) -> list[Reference]:
    """Those outside of what `_profiles` finds."""
    dropped = {id(node) for _, keyword in _profiles(statement) for node in ast.walk(keyword)}
    return [found for found in references(statement) if id(found.node) not in dropped]


def _imports(foreign: set[str]) -> str:
    """The standard library's, then torch and Triton; one line per module."""
    whole = sorted(line for line in foreign if line.startswith("import "))
    by_module: dict[str, list[str]] = {}
    for line in foreign - set(whole):
        _, module, _, name = line.split()
        by_module.setdefault(module, []).append(name)
    named = [f"from {module} import {', '.join(sorted(by_module[module]))}" for module in by_module]
    lines = whole + sorted(named)
    third = [line for line in lines if line.split()[1].partition(".")[0] in ("torch", "triton")]
    standard = [line for line in lines if line not in third]
    return "\n".join([*standard, *([""] if standard else []), *third]) + "\n"


def _heading(source: Source) -> str:
    """Where the next definitions are from, and what its docstring says, as a comment."""
    docstring = f"kernels/{source.name}.py, in part"
    if source.name == STAND_INS.stem:
        docstring = source.docstring.splitlines()[0]
    elif source.name not in REPLACED:
        docstring = f"kernels/{source.name}.py: {source.docstring}"
    return "\n\n" + "".join(f"# {line}".rstrip() + "\n" for line in docstring.splitlines())


def _gap(before: ast.stmt | None, statement: ast.stmt) -> str:
    """Blank lines: two around functions and classes, one under the heading."""
    blocks = (ast.FunctionDef, ast.ClassDef)
    if isinstance(statement, blocks) or isinstance(before, blocks):
        return "\n\n"
    return "\n" if before is None else ""
