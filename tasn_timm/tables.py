"""Tables and numbers as the commands write them."""

from collections.abc import Sequence


def table(rows: Sequence[tuple[str, ...]], align: str) -> str:
    """Write rows as lines of columns; columns that are empty are left out.

    Args:
        rows: Cells.
        align: Of each column, "<" to the left or ">" to the right.
    """
    columns = [
        [f"{cell:{side}{max(map(len, column))}}" for cell in column]
        for side, column in zip(align, zip(*rows))
        if any(column)
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns))
