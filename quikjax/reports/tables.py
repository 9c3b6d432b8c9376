"""Tables as text, and what stands in their cells."""

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, columns aligned for a terminal: the first to the left, numbers to the right.

    >>> print(markdown_table(["name", "ppl"], [["a", "22.7"]]))
    | name |  ppl |
    |------|-----:|
    | a    | 22.7 |
    """
    cells = [list(head), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        fitted = [
            text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(fitted) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *[line(row) for row in cells[1:]]])


def with_clip(label: str, level_clip: Sequence[int] | str | None = None) -> str:
    """Write a packed format's word, and the level clip of its activations if they have one.

    >>> with_clip("W4A8"), with_clip("W4A4", (17, 1)), with_clip("W4A4", "search")
    ('W4A8', 'W4A4/17,1', 'W4A4/search')
    >>> with_clip("W4A4", (16, -8)), with_clip("W8A8", "symmetric"), with_clip("W4A4", (15, -8))
    ('W4A4/symmetric', 'W8A8/symmetric', 'W4A4/symmetric,15')
    """
    if level_clip is None or isinstance(level_clip, str):
        return label if level_clip is None else f"{label}/{level_clip}"
    levels, lowest = level_clip
    if lowest >= 0:
        return f"{label}/{levels},{lowest}"
    return f"{label}/symmetric" if levels == -2 * lowest else f"{label}/symmetric,{levels}"
