"""The GPU benchmark in one command: correctness first, then operations, a whole model, stages, peers, blocks.

    python benchmarks/gpu.py --out DIR             # on a GPU: a table and JSON (default: benchmarks/results/)
    python benchmarks/gpu.py --sections ops split  # parts of it, into files named by them
    python benchmarks/gpu.py --minutes 9           # ends in time and says what it did not come to
    python benchmarks/gpu.py --dry-run --out DIR   # anywhere: every code path at tiny shapes; its times mean nothing

Times of operations are medians of device time (CUPTI's sum of kernels, so gaps between kernels are not in them) over several
input sets; prefill and decode of the whole model are the host's clock. Every ratio is to bf16 of the same run, with everything
included: split, quantization, outlier product, epilogue. Beside it stands the ratio that bytes and operations allow at the copy
bandwidth and bf16 rate measured in this run, int8 counted at twice the bf16 rate.

This process holds no GPU: every section runs in a child (`isolated.py`), and the files are rewritten after every row, so what was
measured before a crash, a hang or a time limit stays.
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

# Memory as it is needed: a reserved pool would hide what a model takes, and leave PyTorch none.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_report
import isolated
from gpu_sections import ALONE, SECTIONS, WITH_GRAPHS, runner
from gpu_timing import without_graphs

from quikjax.pallas_kernels.api import BACKENDS


class Results:
    """Rows as they come, on disk at once."""

    def __init__(self, arguments: argparse.Namespace):
        self.rows: list[isolated.Row] = []
        self.out, self.started = arguments.out, time.monotonic()
        everything = [section for section in SECTIONS if section != "ceilings"]
        self.parts = "" if arguments.sections == everything else "-" + "-".join(arguments.sections)
        command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
        self.head: dict[str, Any] = {"device": "", "versions": {}, "command": command, "dry_run": arguments.dry_run}
        self.head |= {"backend": "xla" if arguments.dry_run else arguments.backend}
        self.platform = ""
        self.written: Path | None = None

    def take(self, section: str, row: isolated.Row) -> None:
        """Keep a row, show it, and write the files anew."""
        if "versions" in row:
            self.head |= {"device": row["device"], "versions": row["versions"]}
            self.platform = row["platform"]
            return
        row = {"section": section, **row}
        self.rows.append(row)
        (done,) = gpu_report.finish([row], 0.0)
        shown = done.get("failed") or (f"{done['milliseconds']:.4f} ms" if done.get("milliseconds") else "")
        print(
            f"{time.monotonic() - self.started:4.0f} s  {row['section']:12} {row['name']:60} {shown}", file=sys.stderr, flush=True
        )
        # What the other sections reckon their ceilings from.
        if section == "ceilings" and done.get("milliseconds"):
            per_second = 1e3 / done["milliseconds"]
            self.head["bandwidth" if "moved_bytes" in row else "rate"] = (
                row["moved_bytes"] if "moved_bytes" in row else row["operations"]
            ) * per_second
        self.written = gpu_report.write(self.head, self.rows, self.out, self._stem())

    def _stem(self) -> str:
        device = "dry-run" if self.head["dry_run"] else "gpu-" + "-".join(str(self.head["device"]).lower().split())
        return f"{device}-jax-{self.head['versions'].get('jax', 'unknown')}{self.parts}"

    @property
    def wrong(self) -> list[str]:
        """Names of the cases that the correctness section found wrong."""
        return [row["name"] for row in self.rows if row["section"] == "correctness" and "failed" in row]


def main() -> int:
    arguments = _arguments()
    if arguments.child is not None:
        return isolated.serve(lambda given: runner(arguments.child, given))
    results = Results(arguments)
    deadline = results.started + 60 * arguments.minutes
    given = {"dry": arguments.dry_run, "backend": results.head["backend"], "repetitions": arguments.repetitions}
    given |= {"every": arguments.every, "threads": arguments.threads}
    for section in ("ceilings", *arguments.sections):
        known = given | {key: results.head[key] for key in ("bandwidth", "rate") if key in results.head}
        names = list(SECTIONS[section][1](arguments.every))
        if arguments.dry_run:
            # The others go through the same code.
            names = [name for name in names if "format" in name][-2:] if section == "correctness" else names
            names = names[: 2 if section in (*ALONE, "correctness") else 1]
        for cases in [[name] for name in names] if section in ALONE else [names]:
            isolated.run(
                [sys.executable, __file__, "--child", section],
                cases,
                known,
                functools.partial(results.take, section),
                patience=arguments.patience,
                deadline=deadline,
                environment={} if section in WITH_GRAPHS else without_graphs(os.environ.get("XLA_FLAGS", "")),
            )
        if section == "ceilings" and results.platform != "gpu" and not arguments.dry_run:
            if results.platform:
                print("this benchmark needs a GPU, and JAX sees none here; --dry-run exercises it without one", file=sys.stderr)
            return 1
    print(gpu_report.last_line(results.written, results.rows, results.wrong))
    return 1 if results.wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [section for section in SECTIONS if section != "ceilings"]
    parser.add_argument("--sections", nargs="*", choices=choices, default=choices)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--backend", default="mosaic", choices=BACKENDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--every", action="store_true", help="check every layer of the lists, not one of each kind")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many, what was measured written (default 60)")
    parser.add_argument(
        "--patience", type=float, default=150, help="seconds without a word that are taken for a hang (default 150)"
    )
    parser.add_argument("--threads", type=int, default=8, help="programs compiled at a time (default 8)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the xla backend; the times mean nothing")
    parser.add_argument("--child", choices=list(SECTIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repetitions < 1 or arguments.threads < 1:
        parser.error("--repetitions and --threads must be at least 1")
    if arguments.minutes <= 0 or arguments.patience <= 0:
        parser.error("--minutes and --patience must be above 0")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
