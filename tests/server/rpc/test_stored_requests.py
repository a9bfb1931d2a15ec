"""A request comes back from the ledger as it was sent."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.ledger.v1 import entry_pb2
from darkroom.v1 import generation_pb2, image_pb2
from darkroom_server.core.job import ImageFormat, PromptSyntax, SchedulerName
from darkroom_server.rpc.requests import generation_request
from darkroom_server.rpc.stored_requests import SCHEMA, StoredRequests, request_message
from darkroom_server.service.idempotency import fingerprint
from darkroom_server.service.request import GenerationRequest
from darkroom_server.service.stored_request import StoredRequest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FLOATS = st.floats(0, 4, width=32)
IMAGES = st.builds(image_pb2.ImageInput, data=st.binary(max_size=8)) | st.builds(
    image_pb2.ImageInput, upload_id=TEXT
)
UNSET = st.none()
FIELDS: dict[str, Any] = {
    "model": TEXT,
    "prompt": TEXT,
    "negative_prompt": TEXT,
    "width": UNSET | st.integers(0, 2000),
    "height": UNSET | st.integers(0, 2000),
    "steps": UNSET | st.integers(0, 100),
    "guidance_scale": UNSET | FLOATS,
    "seed": UNSET | st.integers(0, 2**63 - 1),
    "image_count": UNSET | st.integers(0, 9),
    "scheduler": st.integers(0, len(SchedulerName)),
    "format": st.integers(0, len(ImageFormat)),
    "quality": UNSET | st.integers(1, 100),
    "request_id": TEXT,
    "exact": st.booleans(),
    "on_disconnect": st.sampled_from([1, 2]),
    "embed_record": st.booleans(),
    "true_cfg_scale": UNSET | FLOATS,
    "max_sequence_length": UNSET | st.integers(1, 512),
    "prompt_2": TEXT,
    "negative_prompt_2": TEXT,
    "prompt_3": TEXT,
    "negative_prompt_3": TEXT,
    "empty_negative_prompt": st.booleans(),
    "guidance_rescale": UNSET | FLOATS,
    "prompt_syntax": st.integers(0, len(PromptSyntax)),
    "image": UNSET | IMAGES,
    "mask_image": UNSET | IMAGES,
    "strength": UNSET | FLOATS,
    "reference_images": st.lists(IMAGES, max_size=2),
    "loras": st.lists(st.builds(generation_pb2.Lora, id=TEXT, scale=UNSET | FLOATS), max_size=2),
    "controls": st.lists(
        st.builds(
            generation_pb2.Control,
            id=TEXT,
            image=UNSET | IMAGES,
            scale=UNSET | FLOATS,
            start=UNSET | FLOATS,
            end=UNSET | FLOATS,
        ),
        max_size=2,
    ),
    "ip_adapter_image": UNSET | IMAGES,
    "ip_adapter_scale": UNSET | FLOATS,
}
REQUESTS = st.builds(generation_pb2.GenerateRequest, **FIELDS)
PREVIEWS = st.builds(
    generation_pb2.PreviewOptions,
    every_steps=st.integers(0, 5),
    format=st.integers(0, len(ImageFormat)),
)


def test_every_field_of_a_request_is_tried() -> None:
    assert FIELDS.keys() == {
        field.name for field in generation_pb2.GenerateRequest.DESCRIPTOR.fields
    }


@given(REQUESTS, PREVIEWS)
def test_a_request_is_stored_as_it_was_sent(
    message: generation_pb2.GenerateRequest, preview: generation_pb2.PreviewOptions
) -> None:
    request = generation_request(message, preview)
    stored = StoredRequest(
        request=request,
        seed=3,
        model="demo",
        model_revision="abc",
        address="192.0.2.1",
        priority=-1,
        trace_id="f" * 32,
    )
    found = StoredRequests().decode(StoredRequests().encode(stored))
    assert found == stored
    assert fingerprint(found.request) == fingerprint(request)


def test_pictures_are_stored_beside_the_request() -> None:
    image = image_pb2.ImageInput(data=b"a picture")
    request = generation_request(generation_pb2.GenerateRequest(prompt="a star", image=image))
    message = request_message(request)
    assert not message.image.data
    assert message.image.upload_id.startswith("sha256:")


def test_what_a_newer_server_stored_is_not_read() -> None:
    request = GenerationRequest(prompt="a star")
    stored = StoredRequest(request=request, seed=1, model="demo", model_revision="")
    message = entry_pb2.StoredRequest.FromString(StoredRequests().encode(stored))
    message.schema = SCHEMA + 1
    with pytest.raises(ValueError, match="of schema 2, not 1"):
        StoredRequests().decode(message.SerializeToString())
    with pytest.raises(ValueError, match="not a stored request"):
        StoredRequests().decode(b"\xff\xff")
    assert StoredRequests().decode(StoredRequests().encode(stored)) == stored
