"""Metric labels of numbers that callers choose, in few classes to bound cardinality."""

LARGEST_ROWS = 1024
EDGES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)


def rows_class(rows: int) -> str:
    """The next power of two: 3 rows are "4"."""
    return str(1 << max(0, min(rows, LARGEST_ROWS) - 1).bit_length())


def size_class(width: int, height: int) -> str:
    """The side of the smallest square in ``EDGES`` with as many pixels: 512 by 768 is "768"."""
    for edge in EDGES:
        if width * height <= edge * edge:
            return str(edge)
    return "larger"
