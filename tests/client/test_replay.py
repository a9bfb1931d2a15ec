"""Replay records: readable, stable, strictly checked."""

import dataclasses
import json
from typing import Any

import pytest

from darkroom_client import GenerationRequest, ReplayRecord

RECORD = ReplayRecord(
    request=GenerationRequest(
        prompt="ein großer Stern",
        model="demo",
        width=64,
        height=64,
        steps=20,
        guidance_scale=7.1,
        seed=2**63 - 1,
        image_count=1,
        scheduler="euler",
        format="png",
        quality=90,
        exact=True,
        request_id="r-1",
    ),
    model_revision="r1",
    scheduler_class="EulerDiscreteScheduler",
    scheduler_config={"beta_start": 0.00085, "trained_betas": None, "steps_offset": 1},
    dtype="float32",
    device="cpu",
    preset="fast",
    library_versions={"diffusers": "0.42.1", "torch": "2.13.0"},
    rows_in_last_pass=2,
    pixels_sha256="ab" * 32,
)

DOCUMENT = """\
{
  "darkroom_replay": 1,
  "request": {
    "prompt": "ein großer Stern",
    "model": "demo",
    "negative_prompt": "",
    "width": 64,
    "height": 64,
    "steps": 20,
    "guidance_scale": 7.1,
    "seed": 9223372036854775807,
    "image_count": 1,
    "scheduler": "euler",
    "format": "png",
    "quality": 90,
    "exact": true,
    "request_id": "r-1"
  },
  "model_revision": "r1",
  "scheduler_class": "EulerDiscreteScheduler",
  "scheduler_config": {
    "beta_start": 0.00085,
    "trained_betas": null,
    "steps_offset": 1
  },
  "dtype": "float32",
  "device": "cpu",
  "preset": "fast",
  "library_versions": {
    "diffusers": "0.42.1",
    "torch": "2.13.0"
  },
  "rows_in_last_pass": 2,
  "pixels_sha256": "abababababababababababababababababababababababababababababababab"
}
"""


def test_the_document_is_stable() -> None:
    assert RECORD.to_json() == DOCUMENT
    assert ReplayRecord.from_json(DOCUMENT) == RECORD


OPTIONS: dict[str, Any] = {
    "true_cfg_scale": 0.0,
    "max_sequence_length": 77,
    "prompt_2": "ein Mond",
    "negative_prompt_2": "Regen",
    "prompt_3": "eine Sonne",
    "negative_prompt_3": "Hagel",
    "empty_negative_prompt": True,
    "guidance_rescale": 0.0,
    "prompt_syntax": "plain",
}


def test_a_document_has_the_optional_fields_that_are_set() -> None:
    """Each alone, because a client of 0.1.0 rejects a document with any of them."""
    for name, value in OPTIONS.items():
        record = dataclasses.replace(
            RECORD, request=dataclasses.replace(RECORD.request, **{name: value})
        )
        request = json.loads(record.to_json())["request"]
        assert request.keys() - json.loads(DOCUMENT)["request"].keys() == {name}
        assert request[name] == value
        assert ReplayRecord.from_json(record.to_json()) == record
        assert RECORD.differences(record).keys() == {f"request.{name}"}


def test_a_record_from_the_server_makes_the_round_trip(client: Any) -> None:
    record = client.generate("a star", seed=0, guidance_scale=7.1).images[0].replay

    assert record.request.seed == 0
    assert ReplayRecord.from_json(record.to_json()) == record


def test_a_record_without_a_layout_of_the_vae_means_the_denoisers() -> None:
    for denoiser in (False, True):
        older = dataclasses.replace(RECORD, channels_last=denoiser)
        assert "vae_channels_last" not in json.loads(older.to_json())
        same, other = (
            dataclasses.replace(older, vae_channels_last=vae) for vae in (denoiser, not denoiser)
        )
        assert older.differences(same) == {}
        assert older.differences(other) == {
            "vae_channels_last": (str(denoiser), str(not denoiser)),
        }
        assert ReplayRecord.from_json(other.to_json()) == other


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(DOCUMENT), **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no JSON", "not a replay record"),
        ("[]", "no key 'darkroom_replay'"),
        ("{}", "no key 'darkroom_replay'"),
        (changed(darkroom_replay=2), "version 2; this client reads 1"),
        (changed(colour="red"), "unknown colour"),
        (changed(request=None), "request is not an object"),
        (changed(request={"prompt": "a star"}), "request lacks exact, format"),
        ('{"darkroom_replay": 1}', "record lacks|request is not an object"),
    ],
)
def test_other_documents_are_errors(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReplayRecord.from_json(text)


def test_differences_have_dotted_names() -> None:
    other = dataclasses.replace(
        RECORD,
        request=dataclasses.replace(RECORD.request, request_id="r-2", steps=21),
        dtype="float16",
        library_versions={"torch": "2.14.0", "xformers": "1.0"},
    )

    assert RECORD.differences(RECORD) == {}
    assert RECORD.differences(other) == {
        "dtype": ("float32", "float16"),
        "library_versions.diffusers": ("0.42.1", "-"),
        "library_versions.torch": ("2.13.0", "2.14.0"),
        "library_versions.xformers": ("-", "1.0"),
        "request.steps": ("20", "21"),
    }
