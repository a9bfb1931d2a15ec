"""Pictures on a terminal: each character shows two pixels, one above the other."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table
    import rich.text

_UPPER_HALF = "▀"


def check_pillow() -> None:
    """Raise ``ValueError`` without Pillow."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--preview needs Pillow: pip install 'darkroom-client[cli,pil]'"
        ) from error


def half_blocks(data: bytes, columns: int) -> "rich.text.Text":
    """Decode the picture ``data`` and show it with ``columns`` characters per line."""
    import PIL.Image
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    with PIL.Image.open(io.BytesIO(data)) as picture:
        rows = max(1, round(columns * picture.height / picture.width / 2))
        small = picture.convert("RGB").resize((columns, rows * 2))
    # Three bytes per pixel, row by row.
    pixels = small.tobytes()
    text = Text(no_wrap=True)
    for row in range(rows):
        for column in range(columns):
            upper, lower = (3 * ((2 * row + half) * columns + column) for half in (0, 1))
            style = Style(
                color=Color.from_rgb(*pixels[upper : upper + 3]),
                bgcolor=Color.from_rgb(*pixels[lower : lower + 3]),
            )
            text.append(_UPPER_HALF, style)
        text.append("\n" if row + 1 < rows else "")
    return text


def side_by_side(pictures: "list[rich.text.Text]") -> "rich.table.Table":
    """The pictures in one row."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_row(*pictures)
    return table
