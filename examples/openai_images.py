"""OpenAI's own client on a Darkroom server: only ``base_url`` and the key are changed.

In a checkout:

    pip install ./protos './server[http]' openai
    darkroom-server serve --http-port 8000 &
    python examples/openai_images.py

``DARKROOM_HTTP`` is the server's URL, and ``DARKROOM_TOKEN`` its token if it needs one.
"""

import base64
import os
from pathlib import Path

from openai import OpenAI

URL = os.environ.get("DARKROOM_HTTP", "http://127.0.0.1:8000")

client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("DARKROOM_TOKEN", "unused"))
model = client.models.list().data[0].id

# Fields that OpenAI's API does not have go into extra_body.
images = client.images.generate(
    model=model, prompt="a large yellow star on a blue background", extra_body={"seed": 7}
)
for image in images.data or []:
    Path("star.png").write_bytes(base64.b64decode(image.b64_json or ""))

# Without a mask, an image is a start: strength says how much of it is replaced.
edited = client.images.edit(
    model=model,
    image=Path("star.png"),
    prompt="a large red star on a blue background",
    extra_body={"strength": 0.8, "seed": 7},
)
for image in edited.data or []:
    Path("red-star.png").write_bytes(base64.b64decode(image.b64_json or ""))

with client.images.generate(
    model=model, prompt="a red circle", stream=True, partial_images=2, extra_body={"seed": 7}
) as stream:
    for event in stream:
        if event.type == "image_generation.partial_image":
            print(f"preview {event.partial_image_index}")
            name = f"preview-{event.partial_image_index}.jpg"
        else:
            name = "circle.png"
        Path(name).write_bytes(base64.b64decode(event.b64_json))
