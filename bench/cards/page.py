"""The tables of docs/cards.md, from what was counted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.cards import counting
from bench.cards.counting import FOR_ENCODERS, PACKED
from bench.cards.models import CardModel
from bench.report.markdown import table
from darkroom_server.core.quantization import Quantization
from darkroom_server.engine.device.memory import SAFETY_MARGIN
from darkroom_server.engine.warmup.row_measurement import ROWS

CARDS = (8, 12, 16, 24, 48, 80)
"""The memory of usual cards, in GiB."""

GIB = 1 << 30
NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Part:
    """The bytes of a component: in 16 bits, by the kinds that pack it, and of its largest layer."""

    plain: int
    packed: Mapping[Quantization, int]
    largest: int


@dataclass(frozen=True, kw_only=True)
class Counted:
    """The bytes of a model: its components, a batch of one image, each further row, a decode.

    ``batch`` and ``row`` are 0 if they are not counted.
    """

    model: CardModel
    parts: Mapping[str, Part]
    batch: int
    row: int
    decode: int

    @property
    def work(self) -> int:
        """What must be free besides the weights: decodes and batches take turns."""
        return max(self.batch, self.decode)

    def weights(self, kind: Quantization | None = None) -> int:
        """All weights on the device, packed by ``kind``."""
        return sum(self._bytes(name, kind) for name in self.parts)

    def offloaded(self, *, group: bool, kind: Quantization | None = None) -> int:
        """The weights that ``--offload`` leaves on the device: the next layer is copied ahead."""
        away = {name for name in self.parts if name.startswith("text_encoder")}
        away |= {self.model.denoiser} if group else set()
        stay = sum(self._bytes(name, kind) for name in self.parts.keys() - away)
        return stay + 2 * max(self.parts[name].largest for name in away)

    def _bytes(self, name: str, kind: Quantization | None) -> int:
        part = self.parts[name]
        return part.plain if kind is None else part.packed.get(kind, part.plain)


def count(model: CardModel) -> Counted:
    """Count the bytes of ``model``, on the meta device."""
    parts, batch, row, decode = {}, 0, 0, 0
    for name, make in model.components.items():
        module = counting.on_meta(make)
        plain, kinds = counting.weight_bytes(module), []
        if name == "vae":
            plain, decode = counting.vae_bytes(model, module), counting.decode_bytes(model, module)
        elif name == model.denoiser:
            batch = counting.batch_bytes(model, module, model.rows)
            row = counting.batch_bytes(model, module, model.rows + 1) - batch
            kinds = list(PACKED)
        else:
            kinds = list(FOR_ENCODERS)
        # Casts change the module, so they come last.
        kinds.sort(key=lambda kind: kind is Quantization.FP8)
        largest = counting.largest_layer(module)
        packed = {kind: counting.packed_bytes(module, kind) for kind in kinds}
        parts[name] = Part(plain=plain, packed=packed, largest=largest)
    return Counted(model=model, parts=parts, batch=batch, row=row, decode=decode)


WAYS: Mapping[str, Callable[[Counted], int]] = {
    "16 bits": lambda each: each.weights(),
    "`fp8`": lambda each: each.weights(Quantization.FP8),
    "`fp8-dynamic`": lambda each: each.weights(Quantization.FP8_DYNAMIC),
    "`int8`": lambda each: each.weights(Quantization.INT8),
    "`nf4`": lambda each: each.weights(Quantization.NF4),
    "16 bits, `text-encoder`": lambda each: each.offloaded(group=False),
    "`fp8`, `text-encoder`": lambda each: each.offloaded(group=False, kind=Quantization.FP8),
    "16 bits, `group`": lambda each: each.offloaded(group=True),
}
"""The weights on the device, by the options that are in force."""


def weights_rows(counted: Counted) -> list[list[str]]:
    """A row for each component of a model."""
    rows = []
    for name, part in counted.parts.items():
        packed = [_gib(part.packed[kind]) if kind in part.packed else NONE for kind in PACKED]
        rows.append([f"{counted.model.name}: `{name}`", _gib(part.plain), *packed])
    return rows


def work_row(counted: Counted) -> list[str]:
    """What one image of the default size takes besides the weights."""
    model = counted.model
    batch = [_mib(counted.batch), _mib(counted.row)] if counted.batch else [NONE, NONE]
    return [model.name, f"{model.size}×{model.size}", str(model.rows), *batch, _mib(counted.decode)]


def cards_row(counted: Counted) -> list[str]:
    """For each way: the bytes of weights and work, and the smallest card that has them."""
    cells = []
    for weights in WAYS.values():
        needed = weights(counted) + counted.work
        fits = [card for card in CARDS if needed <= card * GIB * (1 - SAFETY_MARGIN)]
        cells.append(f"{_gib(needed)} → **{fits[0]}**" if fits else f"{_gib(needed)} → {NONE}")
    return [counted.model.name, *cells]


def batch_row(counted: Counted) -> list[str]:
    """The images of the default size in one batch, by card, with weights in 16 bits."""
    own, cells = counted.model.rows, []
    for card in CARDS:
        free = card * GIB * (1 - SAFETY_MARGIN) - counted.weights()
        if free < counted.work or not counted.row:
            cells.append(NONE)
            continue
        rows = own + int((free - counted.batch) // counted.row)
        cells.append(str(min(rows, max(ROWS)) // own))
    return [counted.model.name, *cells]


def sections(every: Sequence[Counted]) -> dict[str, str]:
    """The tables of the page, by the names of their places."""
    return {
        "cards": table(["model", *WAYS], [cards_row(each) for each in every]),
        "card_weights": table(
            ["model: component", "16 bits", *(f"`{kind}`" for kind in PACKED)],
            [row for each in every for row in weights_rows(each)],
        ),
        "card_work": table(
            ["model", "size", "rows of an image", "its batch", "each further row", "decode"],
            [work_row(each) for each in every],
        ),
        "card_batches": table(
            ["model", *(f"{card} GB" for card in CARDS)],
            [row for row in map(batch_row, every) if set(row[1:]) != {NONE}],
        ),
    }


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f}"
