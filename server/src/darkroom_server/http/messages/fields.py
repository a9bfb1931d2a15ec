"""Every field of a request for images, declared once: it is checked, and documented, from here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from darkroom_server.core.errors import Violation
from darkroom_server.core.job import ImageFormat, PromptSyntax, SchedulerName

MAX_WHOLE = 2**63

MAX_LORAS = 64

MAX_UNKNOWN = 20
"""Unknown fields that an error lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field; ``type`` is that of JSON Schema. ``low`` and ``high`` bound a number.

    The model's own limits are checked by the service layer, for every door.
    """

    name: str
    type: str
    help: str
    choices: tuple[str, ...] = ()
    low: int | None = None
    high: int | None = None

    def violation(self, value: Any) -> str | None:
        """Why ``value`` is not valid for this field, None if it is."""
        match self.type:
            case "string":
                return self._text_violation(value)
            case "array":
                return _lora_violation(value)
            case "boolean":
                return None if isinstance(value, bool) else "must be true or false"
            case "integer":
                # A number such as 4.0 is a whole one in JSON.
                whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
                if isinstance(value, bool) or not whole or not -MAX_WHOLE <= value < MAX_WHOLE:
                    return "must be a whole number"
                return self._range_violation(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number"
        if not math.isfinite(value) or not -MAX_WHOLE <= value <= MAX_WHOLE:
            return "must be a finite number"
        return None

    def _text_violation(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return "must be a text"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "must be valid Unicode, without lone surrogates"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        return None

    def _range_violation(self, value: int) -> str | None:
        low, high = self.low, self.high
        if (low is not None and value < low) or (high is not None and value > high):
            return f"must be {low} to {high}, not {value:g}"
        return None

    @property
    def schema(self) -> dict[str, Any]:
        """The field in JSON Schema."""
        bounds = {"minimum": self.low, "maximum": self.high}
        return {
            "type": self.type,
            "description": self.help,
            **({"enum": list(self.choices)} if self.choices else {}),
            **{name: bound for name, bound in bounds.items() if bound is not None},
        }


def _lora_violation(value: Any) -> str | None:
    rule = 'must be a list such as [{"id": "ink", "scale": 0.8}], of at most 64'
    if not isinstance(value, list) or len(value) > MAX_LORAS:
        return rule
    for each in value:
        if not isinstance(each, dict) or not each.keys() <= {"id", "scale"}:
            return rule
        if LORA_ID.violation(each.get("id")) or LORA_SCALE.violation(each.get("scale", 1.0)):
            return rule
    return None


def _text(name: str, help: str, *choices: str) -> Field:
    return Field(name=name, type="string", help=help, choices=choices)


def _whole(name: str, help: str, low: int | None = None, high: int | None = None) -> Field:
    return Field(name=name, type="integer", help=help, low=low, high=high)


def _real(name: str, help: str) -> Field:
    return Field(name=name, type="number", help=help)


def _switch(name: str, help: str) -> Field:
    return Field(name=name, type="boolean", help=help)


LORA_ID = _text("id", "The id of the adapter.")
LORA_SCALE = _real("scale", "How strong the adapter is.")

OPENAI_FIELDS = (
    _text("prompt", "What the images show."),
    _text("model", "A model of this server; may be omitted if it has only one."),
    _whole("n", "The number of images; 1 by default.", 1, 1000),
    _text("size", 'Width and height in pixels, such as "1024x1024"; "auto" is the model\'s own.'),
    _text(
        "quality",
        "How many steps each image takes, if `steps` is not set: `low` is half of the model's "
        "default, `high` and `hd` are one and a half times as many, any other is the default.",
        "auto",
        "low",
        "medium",
        "high",
        "standard",
        "hd",
    ),
    _text("output_format", "The format of the images.", *(format.value for format in ImageFormat)),
    _whole("output_compression", "The quality of JPEG and WEBP: 100 is the best.", 0, 100),
    _text(
        "response_format",
        "`b64_json` (the default) sends the images in the answer; `url` sends signed URLs that "
        "are valid for as long as the server keeps results.",
        "b64_json",
        "url",
    ),
    _text("background", "No model makes transparent images.", "auto", "opaque"),
    _text("user", "Accepted and not used."),
    _text("style", "Accepted and not used.", "vivid", "natural"),
    _text("moderation", "Accepted and not used.", "auto", "low"),
    _switch("stream", "Send server-sent events."),
    _whole("partial_images", "With `stream`: the number of previews of each image.", 0, 1000),
)

OUR_FIELDS = (
    _text("negative_prompt", "What the images must not show."),
    _whole("steps", "Denoising steps of each image."),
    _real("guidance_scale", "Scale of classifier-free guidance."),
    _whole("seed", "The seed of the first image; the others count on. Random by default."),
    _text("scheduler", "The noise scheduler.", *(name.value for name in SchedulerName)),
    _whole("width", "Pixels; instead of `size`."),
    _whole("height", "Pixels; instead of `size`."),
    _switch("exact", "Run each image alone, so that no other request changes its last bits."),
    _switch("embed_record", "Write the record that reproduces each image into its file."),
    _switch("keep", "Let the job run for a while if the caller disconnects."),
    _switch("progress", "With `stream`: send `darkroom.…` events too."),
    _text("prompt_2", "The prompt of the second text encoder."),
    _text("prompt_3", "The prompt of the third text encoder."),
    _text("negative_prompt_2", "The negative prompt of the second text encoder."),
    _text("negative_prompt_3", "The negative prompt of the third text encoder."),
    _switch("empty_negative_prompt", "Guide with an empty negative prompt."),
    _real("guidance_rescale", "How far guidance is rescaled, 0 to 1."),
    _real("true_cfg_scale", "Guidance of a model with embedded guidance."),
    _whole("max_sequence_length", "Tokens of the prompt."),
    _text("prompt_syntax", "How prompts are read.", *(syntax.value for syntax in PromptSyntax)),
    Field(name="loras", type="array", help='LoRA adapters, such as [{"id": "ink", "scale": 0.8}].'),
)

STRENGTH = _real("strength", "How much of the image is replaced, above 0 to 1.")

FIELDS = {field.name: field for field in (*OPENAI_FIELDS, *OUR_FIELDS)}
"""Of ``/v1/images/generations``."""

FORM_FIELDS = {**FIELDS, "strength": STRENGTH}
"""Of ``/v1/images/edits`` and ``/v1/images/variations``, besides the pictures."""


def checked_values(
    body: Mapping[str, Any], fields: Mapping[str, Field]
) -> tuple[dict[str, Any], list[Violation]]:
    """The valid values of ``body``, and what is wrong with the others; null is as if not set."""
    values: dict[str, Any] = {}
    wrong = []
    unknown = [name for name in body if name not in fields]
    for number, name in enumerate(unknown[:MAX_UNKNOWN]):
        known = "" if number else f"; it takes {', '.join(fields)}"
        shown = name[:64].encode("utf-8", "replace").decode()
        wrong.append(Violation(shown, f"is not a field of this request{known}"))
    for name, field in fields.items():
        value = body.get(name)
        if value is None:
            continue
        if (why := field.violation(value)) is not None:
            wrong.append(Violation(name, why))
        else:
            values[name] = int(value) if field.type == "integer" else value
    return values, wrong
