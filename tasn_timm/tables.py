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


def counted(number: int, noun: str) -> str:
    """A number of things: "1 image", "1,200 images", "2 classes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def short(name: str, length: int = 30) -> str:
    """A name with the rest beyond `length` characters left out."""
    return name if len(name) <= length else f"{name[: length - 3]}..."
