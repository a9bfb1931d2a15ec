"""What jobs need of a model, and what models offer."""

from dataclasses import replace

import pytest

from darkroom_server.backends.fake_model import fake_image_model, fake_model
from darkroom_server.core.adapters import AdapterOffer
from darkroom_server.core.inputs import Control, InputImage, Lora
from darkroom_server.core.job import Job, PromptSyntax
from darkroom_server.core.offers import needs_of, offers_of
from tests.server.jobs import make_job

PICTURE = InputImage(width=8, height=8, channels=3, digest="sha256:0", pixels=b"\0" * 192)


@pytest.mark.parametrize(
    ("job", "needs"),
    [
        (make_job(), set()),
        (
            make_job(loras=(Lora(id="night"), Lora(id="day", scale=0.0))),
            {"adapter night", "adapter day"},
        ),
        (make_job(controls=(Control(id="pose", image=PICTURE),)), {"adapter pose"}),
        (make_job(image=PICTURE), {"task image_to_image"}),
        (make_job(image=PICTURE, mask_image=PICTURE), {"task inpaint"}),
        (make_job(reference_images=(PICTURE,)), {"task edit"}),
        (make_job(ip_adapter_image=PICTURE), {"field ip_adapter_image"}),
        (make_job(prompt_syntax=PromptSyntax.WEIGHTED), {"field prompt_syntax"}),
    ],
)
def test_what_a_job_needs_of_its_model(job: Job, needs: set[str]) -> None:
    assert needs_of(job) == {f"{line} of {job.model}" for line in needs}


def test_a_model_offers_what_the_jobs_that_it_takes_need() -> None:
    offers = offers_of([fake_image_model(), fake_model("other")])
    for taken in (
        make_job(loras=(Lora(id="outline"),)),
        make_job(controls=(Control(id="pose", image=PICTURE),)),
        make_job(image=PICTURE, mask_image=PICTURE, ip_adapter_image=PICTURE),
    ):
        assert needs_of(taken) <= offers
        assert not needs_of(replace(taken, model="other")) <= offers
    # Nobody may ask for an adapter that is rejected.
    rejected = AdapterOffer(id="outline", rank=999, bytes=500, rejection="its rank is too great")
    model = replace(fake_image_model(), adapters=(rejected,))
    assert "adapter outline of demo" not in offers_of([model])
