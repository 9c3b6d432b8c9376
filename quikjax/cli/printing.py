"""Print for people: progress as plain lines on stderr, tables on stdout."""

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quikjax.reports.tables import markdown_table as table

if TYPE_CHECKING:
    from quikjax.quantizing.params import LayerResult

__all__ = ["ProgressLines", "duration", "megabytes", "print_json", "say", "size", "table", "with_clip"]


def say(line: str = "") -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


def duration(seconds: int | float) -> str:
    """Seconds for people.

    >>> duration(5.26), duration(75), duration(7322)
    ('5.3 s', '1 min 15 s', '2 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def megabytes(size: int | float) -> str:
    """Bytes in MB (10^6).

    >>> megabytes(92_871_040)
    '92.9 MB'
    """
    return f"{size / 1e6:.1f} MB"


class ProgressLines:
    """Progress of a conversion as lines: one per layer, and what is left after each block."""

    def __init__(self, *, layers: bool = True) -> None:
        self._layers = layers
        self._blocks = 0
        self._said = time.perf_counter()

    def start(self, blocks: int, finished: int) -> None:
        if finished:
            say(f"going on after {finished} of {blocks} blocks that an earlier run finished")
        if self._layers:
            say(f"{'layer':<44} {'bits':<10} {'outliers':>8} {'rel. error':>10} {'SNR':>8} {'time':>8}")

    def layer(self, layer: "LayerResult", seconds: float) -> None:
        if self._layers:
            width = with_clip(layer.format, layer.level_clip)
            damping = "" if layer.damping is None or layer.damping in (0.01, 0.5) else f"  damping {layer.damping:g}"
            say(
                f"{layer.path.removesuffix('.weight'):<44} {width:<10} {layer.outliers:>8} {layer.relative_error:>10.4f} "
                f"{layer.snr_db:>5.1f} dB {seconds:>6.1f} s{damping}"
            )

    def block(self, name: str, done: int, total: int, seconds_left: float) -> None:
        # Blocks of a second or less would only scroll.
        now = time.perf_counter()
        if done < total and (now - self._said > 2 or self._layers):
            self._said = now
            say(f"  block {done} of {total} saved, about {duration(seconds_left)} left")


def with_clip(label: str, level_clip: Sequence[int] | str | None = None) -> str:
    """Write a packed format's word, and the level clip of its activations if they have one.

    >>> with_clip("W4A8"), with_clip("W4A4", (17, 1)), with_clip("W4A4", "search")
    ('W4A8', 'W4A4/17,1', 'W4A4/search')
    """
    clip = "" if level_clip is None else f"/{level_clip if isinstance(level_clip, str) else ','.join(map(str, level_clip))}"
    return label + clip


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, allow_nan=False, indent=2))


def size(count: int | float) -> str:
    """Bytes for people, in powers of ten.

    >>> size(1_500), size(92_871_040), size(2.5e9)
    ('1.5 kB', '92.9 MB', '2.50 GB')
    """
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
