"""What the commands of the command line share: two consoles, and errors as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["err", "errors", "fail", "out"]

out, err = Console(), Console(stderr=True)


@contextmanager
def errors(command: str) -> Iterator[None]:
    """Turn what the user can act on into one line and exit code 2; anything else is a bug."""
    from llama4_triton.model.cache import CacheFull
    from llama4_triton.model.plan import NotEnoughMemory

    try:
        yield
    except (ValueError, TypeError, OSError, CacheFull, NotEnoughMemory) as error:
        fail(str(error) or f"{command}: {type(error).__name__}")
    except ModuleNotFoundError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    err.print(
        f"[red]error:[/] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True
    )
    raise typer.Exit(2)
