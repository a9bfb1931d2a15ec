"""The description of the fake server's models."""

from darkroom.v1 import model_pb2, types_pb2
from darkroom_client.testing._pictures import (
    DEFAULT_GUIDANCE,
    DEFAULT_SIZE,
    DEFAULT_STEPS,
    REVISION,
)


def describe_model(name: str) -> model_pb2.Model:
    """Describe a loaded model."""
    return model_pb2.Model(
        id=name,
        revision=REVISION,
        kind="StableDiffusionPipeline",
        ready=True,
        defaults=model_pb2.ModelDefaults(
            width=DEFAULT_SIZE,
            height=DEFAULT_SIZE,
            steps=DEFAULT_STEPS,
            guidance_scale=DEFAULT_GUIDANCE,
            scheduler=types_pb2.SCHEDULER_EULER,
            format=types_pb2.IMAGE_FORMAT_PNG,
            quality=90,
        ),
        limits=model_pb2.ModelLimits(
            min_size=8,
            max_size=1024,
            size_multiple=8,
            max_guidance_scale=50,
            max_image_count=16,
            max_prompt_bytes=8192,
            prompt_tokens=77,
            max_rows=8,
            row_limit_source=model_pb2.ROW_LIMIT_SOURCE_SET,
        ),
        schedulers=[
            model_pb2.SchedulerOffer(
                scheduler=types_pb2.SCHEDULER_EULER, min_steps=1, max_steps=1000
            )
        ],
        runtime=model_pb2.ModelRuntime(
            device="fake", dtype="float32", preset="fast", attention="sdpa"
        ),
    )
