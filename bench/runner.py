"""The parent's side of the selftest: cases in a child process that may hang, crash or be killed.

One child (worker.py) runs case after case, since starting a GPU context takes seconds. If it dies,
or says nothing for longer than the timeout, it is killed, the case gets the blame, with the launch
it announced last, and the next case gets a fresh child.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["STATUSES", "NoWorker", "Request", "Result", "Runner"]

STATUSES = ("ok", "wrong", "hang", "crash", "oom", "error", "skipped")
POLL_S = 0.02
START_S = 120.0  # to import torch and Triton and make a context, on a busy machine


class NoWorker(RuntimeError):
    """The child process does not start: nothing can be tested."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    id: str
    path: str = "fast"
    features: tuple[str, ...] = ()  # forced on, whatever the records say
    repeats: int = 10  # runs whose bits must be equal
    replays: int = 3  # of a captured graph, each on new values
    tool: str = ""  # "memcheck": under compute-sanitizer


@dataclass(kw_only=True, slots=True)
class Result:
    """How one case went; the report holds it as it is, but for the properties."""

    request: Request
    status: str  # of STATUSES
    message: str = ""
    seconds: float = 0.0
    launches: list[str] = field(default_factory=list)
    at: str = ""  # the launch under way, where the status is hang or crash
    errors: list[dict[str, Any]] = field(default_factory=list)  # per output

    @property
    def worst(self) -> tuple[str, float, float]:
        """Measure, value and bound of the error that comes closest to its bound, or exceeds it."""
        triples = [
            (name, value, errors["bounds"][name])
            for errors in self.errors
            for name, value in errors["values"].items()
        ]
        if not triples:
            return "", 0.0, 0.0
        return max(triples, key=lambda t: _share(t[1], t[2]))

    def as_dict(self) -> dict[str, Any]:
        measure, value, bound = self.worst
        return {
            "id": self.request.id,
            "op": self.request.id.partition("-")[0],
            "path": self.request.path,
            "features": list(self.request.features),
            "tool": self.request.tool,
            "status": self.status,
            "message": self.message,
            "at": self.at,
            "seconds": round(self.seconds, 3),
            "measure": measure,
            "max_error": value if math.isfinite(value) else str(value),
            "bound": bound,
            "launches": self.launches,
        }


def _share(value: float, bound: float) -> float:
    if value != value:
        return float("inf")
    return value / bound if bound else (float("inf") if value else 0.0)


class Runner:
    """Runs requests one at a time. Use it in a `with` statement: it holds a process."""

    def __init__(
        self,
        backend: str,
        *,
        timeout: float,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        """backend: as in worker.py. timeout: seconds of silence. prefix: a command to run it by."""
        self.backend, self.timeout, self.prefix = backend, timeout, tuple(prefix)
        self.variables = {**os.environ, **(environment or {})}
        self.environment: dict[str, Any] = {}  # what the child said of its device
        self.folder = Path(tempfile.mkdtemp(prefix="llama4-triton-selftest-"))
        self.starts = 0
        self.exit_code = 0  # of the last child that ended
        self._process: subprocess.Popen[bytes] | None = None
        self._events: _Tail | None = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, request: Request) -> Result:
        """Run one case; whatever happens to the child becomes the result.

        Raises:
            NoWorker: the child cannot be started.
        """
        start = time.monotonic()
        result = self._run(request)
        result.seconds = time.monotonic() - start
        if result.status in ("hang", "crash"):
            self.stop()
        return result

    def start(self) -> None:
        """Start the child if there is none, and wait until it is ready."""
        if self._process is not None and self._process.poll() is None:
            return
        self.starts += 1
        events = self.folder / f"{self.starts}.events"
        events.touch()
        module = [sys.executable, "-m", "llama4_triton.bench.worker"]
        with self._stderr().open("wb") as stderr:
            self._process = subprocess.Popen(
                [*self.prefix, *module, str(events), self.backend],
                stdin=subprocess.PIPE,
                stdout=stderr,
                stderr=stderr,
                env=self.variables,
                start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
            )
        self._events = _Tail(events)
        event = self._wait(START_S)
        if event is None or event["event"] != "ready":
            why = "said nothing" if self._process.poll() is None else _exit(self._process)
            last = self._last_words()
            self.stop()
            raise NoWorker(f"selftest: the child process must start, got: {why}{last}")
        self.environment = event["environment"]

    def stop(self) -> None:
        """End the child and everything it has started."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                pass
        try:
            # A child at rest ends when its input does, and a tool around it writes its summary.
            self._process.wait(timeout=5.0 if self._idle() else 0.0)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.exit_code = self._process.wait()
        if self._events is not None:
            self._events.close()
        self._process = self._events = None

    def _run(self, request: Request) -> Result:
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None and self._events is not None
        fields = asdict(request)
        fields.pop("tool")
        self._events.busy = True
        try:
            process.stdin.write(json.dumps(fields).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            pass  # it has just died: seen below
        at, doing = "", "its inputs"
        launches: dict[str, None] = {}
        while True:
            event = self._wait(self.timeout)
            if event is None:
                alive = process.poll() is None
                if alive:
                    status, what = "hang", f"nothing for {self.timeout:g} s"
                else:
                    status, what = "crash", _exit(process) + self._last_words()
                where = f"in {at}" if at else f"in {doing}, no launch under way"
                return Result(
                    request=request, status=status, message=f"{what} {where}", at=at,
                    launches=list(launches),
                )  # fmt: skip
            kind = event["event"]
            if kind == "launch":
                at = f"{event['kernel']} {event['config']} grid {tuple(event['grid'])}"
                launches[at] = None
            elif kind == "landed":
                at = ""
            elif kind == "done":
                self._events.busy = False
                return Result(
                    request=request,
                    status=event["status"],
                    message=event["message"],
                    errors=event["errors"],
                    launches=event["launches"],
                    at=at if event["status"] in ("crash", "oom", "error") else "",
                )
            else:
                doing = {"judging": "the reference"}.get(kind, f"{kind} {event.get('number', '')}")

    def _wait(self, timeout: float) -> dict[str, Any] | None:
        """The next event; None if the child has died or was silent for `timeout` seconds."""
        assert self._process is not None and self._events is not None
        end = time.monotonic() + timeout
        while True:
            died = self._process.poll() is not None  # before reading: its last words count
            event = self._events.read()
            if event is not None:
                return event
            if died or time.monotonic() > end:
                return None
            time.sleep(POLL_S)

    def _idle(self) -> bool:
        return self._events is not None and not self._events.busy

    def _stderr(self) -> Path:
        return self.folder / f"{self.starts}.stderr"

    def _last_words(self) -> str:
        lines = self._stderr().read_text(errors="replace").strip().splitlines()
        return f" ({lines[-1].strip()[:200]})" if lines else ""


class _Tail:
    """Reads the lines that another process appends to a file."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        self.rest = b""
        self.busy = False  # the child has something to do

    def read(self) -> dict[str, Any] | None:
        self.rest += self.file.read()
        line, newline, rest = self.rest.partition(b"\n")
        if not newline:
            return None
        self.rest = rest
        event: dict[str, Any] = json.loads(line)
        return event

    def close(self) -> None:
        self.file.close()


def _exit(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is not None and code < 0:
        try:
            return f"the process was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"the process was ended by signal {-code}"
    return f"the process ended with exit code {code}"
