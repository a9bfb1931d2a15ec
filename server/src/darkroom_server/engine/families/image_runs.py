"""Runs of diffusers' pipelines for jobs that bring an image, beside a hand-written loop."""

import functools
from dataclasses import replace
from typing import Any

from darkroom_server.core.job import Job, Task
from darkroom_server.engine.components.schedulers import config_of, make_scheduler
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder
from darkroom_server.engine.conditioning.input_images import image_arguments
from darkroom_server.engine.conditioning.ip_adapter import image_prompt
from darkroom_server.engine.conditioning.task_pipelines import made_of
from darkroom_server.engine.families.base import Family, Precision
from darkroom_server.engine.families.unet import UNET
from darkroom_server.engine.pipelines.arguments import signature_of
from darkroom_server.engine.pipelines.encode_memo import EncodeMemo
from darkroom_server.engine.pipelines.hosted_pipeline import HostedPipeline
from darkroom_server.engine.pipelines.hosted_scheduler import hosted_scheduler
from darkroom_server.engine.pipelines.runs import Runs
from darkroom_server.engine.warmup.formats import MemoryFormat


def image_runs_of(family: Family, memory_format: MemoryFormat, precision: Precision) -> Runs | None:
    """The runs of the jobs that bring an image, None if the model takes none."""
    pipeline, device = family.pipeline, family.denoiser.device
    classes = family.task_classes
    if family.ip_adapter is None:
        del classes[family.own_task]
    made = {task: made_of(pipeline, each) for task, each in classes.items()}
    if not made:
        return None
    # The prompts come encoded, so there is nothing to remember.
    first, memo = next(iter(made.values())), EncodeMemo(0, device)
    host = HostedPipeline(first, (family.denoiser_name,), family.vae, device, memo)
    config = config_of(pipeline.scheduler)
    merges = signature_of(type(family.denoiser)) == UNET.signature
    return Runs(
        hosts={task: host.sharing(each) for task, each in made.items()},
        images=ImageEncoder(family.vae, precision),
        spec=replace(UNET, layout=memory_format.layout) if merges else None,
        arguments_of=functools.partial(_image_call, family),
        vae_latents=lambda stepped, _: stepped,
        schedulers={
            offer.name: hosted_scheduler(make_scheduler(offer.name, config))
            for offer in family.scheduler_offers
        },
        own={},
        precision=precision,
        ip_adapter=family.ip_adapter,
    )


def _image_call(family: Family, job: Job) -> dict[str, Any]:
    """The arguments of the pipeline's call for ``job``, besides its prompts."""
    size = {} if job.task is Task.IMAGE_TO_IMAGE else {"width": job.width, "height": job.height}
    return {
        **image_prompt(family.ip_adapter, job, family.guidance),
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale,
        "output_type": "pt",
        "return_dict": False,
        **size,
        **image_arguments(job),
    }
