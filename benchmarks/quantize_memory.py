"""Peak resident memory of quantizing a shallow and a deep checkpoint of the same width: it must not grow with depth.

    python benchmarks/quantize_memory.py [--hidden 2048] [--blocks 2 8] [--samples 4] [--seqlen 512]

Random checkpoints are written to a temporary directory and quantized by `quikjax quantize`, each in a process of its own whose
peak the operating system reports. Ends with status 1 where the ratio exceeds `--limit`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_checkpoint import write_checkpoint


def quantize(model: Path, out: Path, samples: int, seqlen: int) -> tuple[float, float]:
    """Peak resident MiB and seconds of one process."""
    command = [
        sys.executable,
        "-c",
        "from quikjax.cli import main; main()",
        "quantize",
        str(model),
        "--out",
        str(out),
        "--calibration",
        "pydoc",
    ]
    command += ["--samples", str(samples), "--seqlen", str(seqlen)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not out.is_dir():
        sys.exit(f"quantizing {model.name} failed with status {process.returncode}")
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of quantizing against depth.")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 8), metavar=("FEW", "MANY"))
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=float, default=1.15)
    arguments = parser.parse_args()
    peaks, seconds = [], []
    print("| blocks | checkpoint MB | peak resident MiB | seconds |")
    print("|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        for blocks in arguments.blocks:
            model = write_checkpoint(
                Path(directory) / f"blocks-{blocks}",
                hidden_size=arguments.hidden,
                intermediate_size=round(arguments.hidden * 2.6875 / 16) * 16,
                num_hidden_layers=blocks,
                num_attention_heads=arguments.hidden // 64,
                num_key_value_heads=arguments.hidden // 64,
                max_position_embeddings=4096,
            )
            size = sum(file.stat().st_size for file in model.iterdir()) / 1e6
            peak, took = quantize(model, model.with_name(f"packed-{blocks}"), arguments.samples, arguments.seqlen)
            print(f"| {blocks} | {size:.0f} | {peak:.0f} | {took:.0f} |", flush=True)
            peaks.append(peak)
            seconds.append(took)
    ratio = peaks[1] / peaks[0]
    print(f"\nratio {ratio:.3f}, limit {arguments.limit}")
    print(json.dumps({"machine": platform.machine(), **vars(arguments), "peak_mib": peaks, "seconds": seconds, "ratio": ratio}))
    sys.exit(ratio > arguments.limit)


if __name__ == "__main__":
    main()
