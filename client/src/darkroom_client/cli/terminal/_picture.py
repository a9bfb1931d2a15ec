"""An image left on the terminal, in the best way that it offers."""

import base64
import importlib.util
import io
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.image import Image
from darkroom_client.cli.terminal._capability import Graphics, graphics
from darkroom_client.cli.terminal._halfblocks import half_blocks

if TYPE_CHECKING:
    import PIL.Image
    import rich.console

COLUMNS = 32
_SIXEL_PIXELS = 256
_COLOURS = 256
_KITTY_CHUNK = 4096


def leave_picture(console: "rich.console.Console", image: Image) -> None:
    """Print ``image``; prints nothing without Pillow."""
    if importlib.util.find_spec("PIL") is None:
        return
    picture = image.to_pil()
    way = graphics()
    if way is Graphics.HALF_BLOCKS:
        console.print(half_blocks(png(picture), COLUMNS))
        return
    console.file.write(encode(way, image, picture) + "\n")
    console.file.flush()


def encode(way: Graphics, image: Image, picture: "PIL.Image.Image") -> str:
    """The escape sequences that show ``image``; ``picture`` is its pixels."""
    match way:
        case Graphics.KITTY:
            return _kitty(png(picture))
        case Graphics.ITERM:
            raw = image.format is ImageFormat.RAW_RGB
            return _iterm(png(picture) if raw else image.data)
        case _:
            return _sixel(picture)


def png(picture: "PIL.Image.Image") -> bytes:
    """``picture`` as a PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _kitty(data: bytes) -> str:
    """Kitty's graphics protocol: a PNG in chunks."""
    text = base64.b64encode(data).decode()
    chunks = [text[at : at + _KITTY_CHUNK] for at in range(0, len(text), _KITTY_CHUNK)]
    sequences = []
    for index, chunk in enumerate(chunks):
        control = f"a=T,f=100,q=2,c={COLUMNS}," if index == 0 else ""
        more = int(index + 1 < len(chunks))
        sequences.append(f"\x1b_G{control}m={more};{chunk}\x1b\\")
    return "".join(sequences)


def _iterm(data: bytes) -> str:
    """Inline images of iTerm: a file in any format."""
    text = base64.b64encode(data).decode()
    return f"\x1b]1337;File=inline=1;size={len(data)};width={COLUMNS}:{text}\x07"


def _sixel(picture: "PIL.Image.Image") -> str:
    """Sixels: bands of six rows, and each band once for each of its colours."""
    height = max(1, round(_SIXEL_PIXELS * picture.height / picture.width))
    small = picture.resize((_SIXEL_PIXELS, height)).quantize(_COLOURS)
    palette = small.getpalette() or []
    colours = [palette[at : at + 3] for at in range(0, len(palette), 3)]
    # Sixel counts colours in percent.
    registers = "".join(
        f"#{index};2;" + ";".join(str(round(value * 100 / 255)) for value in colour)
        for index, colour in enumerate(colours)
    )
    pixels = small.tobytes()
    rows = [pixels[at : at + _SIXEL_PIXELS] for at in range(0, len(pixels), _SIXEL_PIXELS)]
    bands = "-".join("$".join(_band(rows[at : at + 6])) for at in range(0, height, 6))
    return f'\x1bPq"1;1;{_SIXEL_PIXELS};{height}{registers}{bands}\x1b\\'


def _band(rows: list[bytes]) -> Iterator[str]:
    """Up to six rows of colour numbers: for each colour, a character for each column."""
    for colour in sorted({colour for row in rows for colour in row}):
        bits = [
            sum((row[column] == colour) << index for index, row in enumerate(rows))
            for column in range(_SIXEL_PIXELS)
        ]
        yield f"#{colour}" + "".join(
            f"!{count}{chr(63 + value)}"
            if (count := len(list(run))) > 3
            else chr(63 + value) * count
            for value, run in groupby(bits)
        )
