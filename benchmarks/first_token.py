"""Seconds from typing `quikjax generate` to the first piece of text on the screen, of the whole process.

    python benchmarks/first_token.py [MODEL ...] [--rounds 5] [--prompt "Once upon a time"] [-o md|json]

Cold is the first start, with an empty folder for compiled programs; warm are the starts after it, which find them there. Each is
a process of its own, and the clock stops when the first byte of the continuation arrives in the pipe that stands for the screen.
Beside them: `--help`, and a mistake, which should be instant. Behind each median stand the seconds of CPU, over all cores, that a
process took to its end, which other programs on the machine disturb less than they do the clock.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

COMMAND = (sys.executable, "-m", "quikjax.cli")


def cpu_seconds() -> float:
    """CPU seconds of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def first_byte(arguments: list[str]) -> tuple[float, float]:
    """Seconds until the command's first byte on stdout, and until its end."""
    start = time.perf_counter()
    # Unbuffered: a reader that waits for a full buffer would measure the whole text.
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        given = process.stdout.read(1)
        first = time.perf_counter() - start
        process.stdout.read()
        said = process.stderr.read().decode()
    if process.returncode or not given:
        sys.exit(f"quikjax {' '.join(arguments)} failed: {said}")
    return first, time.perf_counter() - start


def whole(arguments: list[str], expected: int) -> float:
    """Seconds of a command that ends with the status `expected`."""
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != expected:
        sys.exit(f"quikjax {' '.join(arguments)} ended with {done.returncode}: {done.stderr.decode()}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", default=["smollm2-135m"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory(prefix="quikjax-first-token-") as cache:
            typed = ["generate", model, arguments.prompt, "--max-new-tokens", "16", "--cache-dir", cache]
            cold, _ = first_byte(typed)
            before = cpu_seconds()
            warm = [first_byte(typed) for _ in range(arguments.rounds)]
            cpu = (cpu_seconds() - before) / arguments.rounds
        rows.append({"what": f"generate {model}, cold", "seconds": [cold]})
        rows.append({"what": f"generate {model}, warm", "seconds": [first for first, _ in warm]})
        ends = [end for _, end in warm]
        rows.append({"what": f"generate {model}, warm, 16 tokens to the end", "seconds": ends, "cpu": cpu})
    for what, typed, expected in (
        ("--help", ["--help"], 0),
        ("a model that is not there", ["generate", "no-such-model", "x"], 1),
    ):
        before = cpu_seconds()
        seconds = [whole(typed, expected) for _ in range(arguments.rounds)]
        rows.append({"what": what, "seconds": seconds, "cpu": (cpu_seconds() - before) / arguments.rounds})
    for row in rows:
        row["median"] = statistics.median(row["seconds"])
    if arguments.output == "md":
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seconds to the first byte, medians\n"
        )
        print("| | median | lowest | highest | runs | CPU |\n|---|---:|---:|---:|---:|---:|")
        for row in rows:
            some = row["seconds"]
            cpu_of_one = f"{row['cpu']:.2f}" if "cpu" in row else ""
            print(f"| {row['what']} | {row['median']:.2f} | {min(some):.2f} | {max(some):.2f} | {len(some)} | {cpu_of_one} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
