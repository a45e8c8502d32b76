"""`python -m llama4_triton` and the command `llama4-triton`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without its optional dependencies say what to install."""
    try:
        from llama4_triton.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"llama4-triton: the command line needs {error.name}: pip install 'llama4-triton[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    main()
