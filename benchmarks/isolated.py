"""Cases run one after the other in a child process, so that one that crashes, hangs or poisons the GPU costs only itself.

An illegal access in one kernel fails every later call of its process, and a kernel that waits for ever cannot be interrupted.
The parent therefore holds no GPU: it hands names of cases to a child, takes rows as they are measured, and when the child dies or
says nothing for too long, names the case that was running as failed and starts another child with the rest.

    parent -> child    stdin, one line: {"cases": [...], "given": {...}}
    child -> parent    stdout, lines marked `@`: {"case": c, "begin": true}, {"row": {...}}, {"case": c, "end": true}
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MARK = "@"
Row = dict[str, Any]


def run(
    command: Sequence[str],
    cases: Sequence[str],
    given: Mapping[str, Any],
    on_row: Callable[[Row], None],
    *,
    patience: float,
    deadline: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `cases` in children started by `command`, handing every row to `on_row` as it comes.

    A case that fails gives one row `{"failed": reason, "name": case}`; one that `deadline` (of `time.monotonic`) left no time for
    gives one too. `patience`: seconds without a word after which a child is taken to hang. `environment`: of the children, beside
    this process's own.
    """
    left = list(cases)
    while left and time.monotonic() < deadline:
        reason, case = _one_child(command, left, given, on_row, patience, deadline, environment or {})
        if reason is None:
            return
        if case is None:
            # It did not come as far as a case, so the next child would not either.
            break
        on_row({"name": case, "failed": reason})
    else:
        reason = "not run: out of time"
    for case in left:
        on_row({"name": case, "failed": reason})


def _one_child(
    command: Sequence[str],
    left: list[str],
    given: Mapping[str, Any],
    on_row: Callable[[Row], None],
    patience: float,
    deadline: float,
    environment: Mapping[str, str],
) -> tuple[str | None, str | None]:
    """Run a child until it ends; cases that began leave `left`. Returns why it ended early (None: all done) and in which."""
    inherited = {**os.environ, **environment}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=inherited)
    assert child.stdin is not None
    assert child.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: Any) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, args=(child.stdout,), daemon=True)
    reader.start()
    current: str | None = None
    try:
        with child.stdin as stdin:
            stdin.write(json.dumps({"cases": left, "given": dict(given)}) + "\n")
        while True:
            wait = min(patience, deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(0.0, wait))
            except queue.Empty:
                out_of_time = time.monotonic() >= deadline
                return ("stopped: out of time" if out_of_time else f"no answer in {patience:.0f} s: it hangs"), current
            if line is None:
                code = child.wait()
                return (None, None) if code == 0 and current is None else (_how(code), current)
            if not line.startswith(_MARK):
                sys.stderr.write(line)
                continue
            message = json.loads(line[1:])
            if message.get("begin"):
                current = message["case"]
                left.remove(current)
            elif message.get("end"):
                current = None
            else:
                on_row(message["row"])
    except BrokenPipeError:
        return _how(child.wait()), current
    finally:
        child.kill()
        child.wait()
        reader.join()
        child.stdout.close()


def _how(code: int) -> str:
    return f"the process was ended by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"


def serve(prepare: Callable[[Mapping[str, Any]], Callable[[str, Callable[[Row], None]], None]]) -> int:
    """The child's side: `prepare(given)` returns the function that runs one case, handing its rows to the emitter it is given.

    A case that raises gives a row that says so, and the next one runs.
    """
    request = json.loads(sys.stdin.readline())
    run_case = prepare(request["given"])
    for case in request["cases"]:
        _say({"case": case, "begin": True})
        try:
            run_case(case, lambda row: _say({"row": row}))
        except Exception as failure:
            traceback.print_exc()
            _say({"row": {"name": case, "failed": first_line(failure)}})
        _say({"case": case, "end": True})
    return 0


def progress(text: str) -> None:
    """A word from a child that is busy, so that it is not taken to hang; the parent shows it."""
    print(text, flush=True)


def first_line(failure: Exception) -> str:
    """An exception in one line."""
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"


def _say(message: Row) -> None:
    print(_MARK + json.dumps(message), flush=True)
