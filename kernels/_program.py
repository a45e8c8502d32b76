"""What one call of an operator does, as data: memory it makes, launches, results.

    result, program, *_ = recorded(lambda: implementation(x, weight, eps, None), [x, weight])
    program.run([x2, weight2])          the same launches on other tensors of the same layout

An operator's host code looks at layouts, never at values, so calls of one layout differ in their
tensors only. A program numbers what launches name: first the tensors given, then, as they were met,
the memory made, views, constants, and tuples of all these, as kernels take them.

There is no program of a call that does anything else on the device than launch kernels (a fill, a
copy), that is given one tensor twice, or takes a view of memory that two given tensors share: which
one is meant could not be told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ._launch import intercept, launch

__all__ = ["Program", "Recording", "Step", "recorded"]

CONSTANTS = frozenset({type(None), bool, int, float, str})
MEMORY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})

Take = Callable[[list[Any]], Sequence[Any]]  # some of the numbered things, in order


class Made(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class View(NamedTuple):
    source: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # from the source's first element


class Constant(NamedTuple):
    value: Any


class Group(NamedTuple):
    kind: type  # tuple, or a named one
    take: Take


class Step(NamedTuple):
    """One launch."""

    kernel: Any
    grid: tuple[int, ...]
    take: Take  # its positional arguments
    options: dict[str, Any]  # by keyword
    positional: int  # how many the others are
    compiled: Any  # what Triton launched when this was recorded; None: it was interpreted


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """See the module."""

    recipes: tuple[Made | View | Constant | Group, ...]
    steps: tuple[Step, ...]
    results: Take | None  # None: there is none
    is_single: bool  # one result is returned as it is, several as a tuple

    def things(
        self, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor] | None = None
    ) -> list[Any]:
        """All that a launch can name, by number; `made` is used instead of new memory."""
        things: list[Any] = list(given)
        count = 0
        for recipe in self.recipes:
            if isinstance(recipe, Made):
                size, stride, dtype = recipe
                if made is None:
                    device = things[0].device
                    things.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
                else:
                    things.append(made[count])
                    count += 1
            elif isinstance(recipe, View):
                source, dtype, size, stride, offset = recipe
                x = things[source].view(dtype)
                things.append(x.as_strided(size, stride, x.storage_offset() + offset))
            elif isinstance(recipe, Constant):
                things.append(recipe.value)
            else:
                things.append(tuple.__new__(recipe.kind, recipe.take(things)))
        return things

    def run(self, given: Sequence[torch.Tensor]) -> Any:
        """Make the memory, launch, and return the results."""
        things = self.things(given)
        for kernel, grid, take, options, _, _ in self.steps:
            launch(kernel, grid, *take(things), **options)
        if self.results is None:
            return None
        results = self.results(things)
        return results[0] if self.is_single else tuple(results)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    result: Any
    program: Program | None
    made: list[torch.Tensor]  # the memory of this call
    why: str  # there is no program


def recorded(
    run: Callable[[], Any], given: Sequence[torch.Tensor], *, with_results: bool = True
) -> Recording:
    """Call `run`, which works on `given`, and write down what it does.

    with_results: it returns a tensor, a tuple of them or None, which the program returns as well,
        in new memory. False: the program is for the memory of this recording.
    """
    launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any], Any]] = []
    watch = _Watch()

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        with intercept(None):
            watch.is_on = False
            compiled = launch(kernel, grid, *args, **kwargs)
            watch.is_on = True
        launches.append((kernel, grid, args, kwargs, compiled))

    with intercept(note), watch:
        result = run()
    try:
        if watch.other:
            raise _UntoldError(f"{watch.other}, which is no launch of a kernel")
        writer = _Writer(given, watch.made if with_results else None)
        steps = []
        for kernel, grid, args, kwargs, compiled in launches:
            if any(isinstance(value, torch.Tensor) for value in kwargs.values()):
                raise _UntoldError("a tensor by keyword")
            steps.append(Step(kernel, grid, writer.taking(args), kwargs, len(args), compiled))
        is_single = isinstance(result, torch.Tensor)
        flat = None if not with_results else [result] if is_single else result
        program = Program(
            results=None if flat is None else writer.taking(flat),
            recipes=tuple(writer.recipes),
            steps=tuple(steps),
            is_single=is_single,
        )
        return Recording(result=result, program=program, made=writer.made, why="")
    except _UntoldError as error:
        return Recording(result=result, program=None, made=[], why=str(error))


class _UntoldError(Exception):
    """There is no program; the message says what stands in its way."""


class _Watch(TorchDispatchMode):
    """Notes what works on the device without being a launch, outside of launches."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = True
        self.other = ""
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        from ._library import NAMESPACE, dispatched  # which imports this file

        name = func._schema.name.split("::")[1]
        if func.namespace == NAMESPACE:
            with self:  # a mode is off inside its own handler
                return dispatched[name](*args)
        out = func(*args, **(kwargs or {}))
        if name in MEMORY:
            self.made.append(out)
        elif self.is_on:
            is_view = any(returned.alias_info is not None for returned in func._schema.returns)
            if func._schema.is_mutable or not is_view:
                self.other = str(func)
        return out


class _Writer:
    """Gives numbers to what is met.

    Of tensors that were not given, those are memory to make that `made` has. None: all of them,
    for a program that will run with the memory of its recording.
    """

    def __init__(self, given: Sequence[torch.Tensor], made: list[torch.Tensor] | None):
        self._making = None if made is None else {_storage(x) for x in made}
        self.recipes: list[Made | View | Constant | Group] = []
        self.made: list[torch.Tensor] = []
        self._count = self._of_given = len(given)
        self._device = given[0].device
        self._tensors = dict(enumerate(given))  # by number; kept: no identity is used twice
        self._known: dict[int, int] = {}  # tensors' numbers by identity
        self._owners: dict[int, list[int]] = {}  # by storage: given tensors, or the one made
        for number, x in enumerate(given):
            if id(x) in self._known:
                raise _UntoldError("one tensor that is given twice")
            self._known[id(x)] = number
            self._owners.setdefault(_storage(x), []).append(number)

    def taking(self, values: Sequence[Any]) -> Take:
        numbers = [self._number(value) for value in values]
        if len(numbers) > 1:
            return itemgetter(*numbers)
        # Of one number or none `itemgetter` would not return a sequence.
        return itemgetter(slice(numbers[0], numbers[0] + 1) if numbers else slice(0))

    def _number(self, value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, tuple):
            return self._add(Group(type(value), self.taking(value)))
        if type(value) in CONSTANTS:
            return self._add(Constant(value))
        raise _UntoldError(f"a {type(value).__name__}")

    def _tensor(self, x: torch.Tensor) -> int:
        known = self._known.get(id(x))
        if known is not None:
            return known
        owners = self._owners.get(_storage(x))
        size, stride = tuple(x.shape), x.stride()
        if owners is None:
            if self._making is not None:
                whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
                if not whole or x.device != self._device or _storage(x) not in self._making:
                    raise _UntoldError("memory of another kind or time")
            self.made.append(x)
            number = self._add(Made(size, stride, x.dtype))
            self._owners[_storage(x)] = [number]
        elif self._making is None and owners[0] >= self._of_given:
            self.made.append(x)  # the tensor itself will be there again
            number = self._add(Made(size, stride, x.dtype))
        elif len(owners) == 1:
            source = self._tensors[owners[0]]
            if source.element_size() != x.element_size():
                raise _UntoldError("a view of elements of another size")
            offset = int(x.storage_offset() - source.storage_offset())
            number = self._add(View(owners[0], x.dtype, size, stride, offset))
        else:
            raise _UntoldError("a view of memory that two arguments share")
        self._known[id(x)] = number
        self._tensors[number] = x
        return number

    def _add(self, recipe: Made | View | Constant | Group) -> int:
        self.recipes.append(recipe)
        self._count += 1
        return self._count - 1


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata
