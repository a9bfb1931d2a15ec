"""The memory that batches and decodes of a model need."""

from dataclasses import dataclass


def heads_of_slice(heads: int, scale: float) -> int:
    """The heads in a slice of attention whose image has ``scale`` times the default's pixels.

    The scores of a head grow with the square of the pixels; at the default size a slice has
    ``heads``.
    """
    return max(1, int(heads / max(1.0, scale) ** 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """Memory of batches and decodes besides the weights, measured at warm-up, in bytes.

    ``bytes_per_row`` and ``bytes_per_decode`` are for an image of ``pixels`` and grow in proportion
    to its pixels. A decode by tiles of ``tile_pixels`` needs no more than one tile.
    ``bytes_per_pass`` is needed once for all rows, and grows with the square of the pixels: the
    scores of sliced attention. ``available_bytes`` was free on the device, less a safety margin.
    ``bytes_per_sample`` is what an unfinished image of one row holds between its batches; it grows
    at most in proportion to its pixels and rows. ``control_bytes_per_row`` is what ControlNets add
    to ``bytes_per_row``.

    ``heads_per_slice``: a slice of attention has this number of heads at ``pixels``, and fewer at
    larger sizes; 0: the same number at each size. ``sdpa_bytes_per_row``: a row's bytes with SDPA
    in place of slices, 0 if the runtime has no such choice.
    """

    pixels: int
    bytes_per_row: int
    bytes_per_decode: int
    available_bytes: int
    bytes_per_pass: int = 0
    tile_pixels: int | None = None
    bytes_per_sample: int = 0
    control_bytes_per_row: int = 0
    heads_per_slice: int = 0
    sdpa_bytes_per_row: int = 0

    def uses_sdpa(self, width: int, height: int) -> bool:
        """Whether batches of this size run with SDPA: no slice is fine enough for two rows."""
        if not self.sdpa_bytes_per_row:
            return False
        scale = width * height / self.pixels
        sliced = 2 * self.bytes_per_row * scale + self._slice_bytes(scale)
        return 2 * self.sdpa_bytes_per_row * scale < sliced > self.available_bytes

    def _per_row_and_once(self, scale: float, *, uses_sdpa: bool) -> tuple[float, float]:
        """The bytes of each row of a batch without ControlNets, and those that it needs once."""
        if uses_sdpa:
            return self.sdpa_bytes_per_row * scale, 0.0
        return self.bytes_per_row * scale, self._slice_bytes(scale)

    def _slice_bytes(self, scale: float) -> float:
        grown = self.bytes_per_pass * scale**2
        if not self.heads_per_slice:
            return grown
        return grown * heads_of_slice(self.heads_per_slice, scale) / self.heads_per_slice

    def needed(
        self,
        width: int,
        height: int,
        rows: int,
        *,
        reference_pixels: int = 0,
        controlled: bool = False,
    ) -> int:
        """The peak of one image of ``rows`` rows: its batch or its decode, whichever needs more.

        ``reference_pixels`` are those of a job, which are not decoded. ``controlled``: with
        ControlNets.
        """
        scale = (width * height + reference_pixels) / self.pixels
        sdpa = self.uses_sdpa(width, height)
        per_row, once = self._per_row_and_once(scale, uses_sdpa=sdpa)
        passes = rows * (per_row + controlled * self.control_bytes_per_row * scale) + once
        scale = width * height / self.pixels
        if self.tile_pixels is not None:
            scale = min(1.0, width * height / self.tile_pixels)
        return round(max(passes, self.bytes_per_decode * scale))

    def rows_that_fit(self, width: int, height: int, held: int | None = None) -> int:
        """Rows of one batch at this size, at least 2; admission rejects images that never fit.

        Unfinished images hold ``held`` bytes now; with None, those of the batch itself are counted.
        """
        scale = width * height / self.pixels
        # Half of the peak of two rows for each row: with more rows than were measured, the peak may
        # be in another layer, where more memory grows with the rows.
        sdpa = self.uses_sdpa(width, height)
        each, once = self._per_row_and_once(scale, uses_sdpa=sdpa)
        per_row = each + self.control_bytes_per_row * scale + once / 2
        if held is None:
            per_row += self.bytes_per_sample * max(1.0, scale)
        return max(2, int((self.available_bytes - (held or 0)) / max(1.0, per_row)))
