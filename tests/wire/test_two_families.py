"""A tiny SDXL, FLUX.1 and FLUX.2 klein in one server: pictures, fields, errors, over the wire."""

import base64
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import httpx2
import numpy as np
import PIL.Image
import pytest
import torch

from bench.tiny_families.flux import write_dev
from bench.tiny_families.flux_2 import write_distilled_klein
from bench.tiny_families.parts import shaken
from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_client import (
    AdapterKind,
    AdapterNotFound,
    Client,
    Control,
    InvalidRequest,
    Scheduler,
    Task,
    UploadedImage,
)
from darkroom_client.cli import main
from darkroom_server.engine.conditioning.input_images import pil_image
from tests.engine.families.controls import flux_net, unet_net
from tests.engine.families.image_tasks import picture
from tests.engine.ip_adapter_files import write_image_encoder, write_ip_adapter

from .conftest import running_server
from .test_other_clients import SECONDS, buf_curl

PROMPT = "a large yellow star on a blue background"
SEEDS = (11, 12, 13)

XL: dict[str, Any] = {
    "prompt_2": "a small heart",
    "negative_prompt": "blue",
    "guidance_scale": 5.0,
    "guidance_rescale": 0.5,
}
FLUX: dict[str, Any] = {
    "prompt_2": "a small heart",
    "negative_prompt": "blue",
    "guidance_scale": 2.5,
    "true_cfg_scale": 3.0,
    "max_sequence_length": 32,
}


@dataclass(frozen=True, slots=True)
class Served:
    address: str
    http: str
    folders: dict[str, Path]
    adapter: Path
    nets: dict[str, Path]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    folders = {
        "xl": write_sdxl(folder / "xl"),
        "flux": write_dev(folder / "flux"),
        "klein": write_distilled_klein(folder / "klein"),
    }
    nets = {"xl": folder / "xl-edges", "flux": folder / "flux-edges"}
    unet = diffusers.UNet2DConditionModel.from_pretrained(folders["xl"] / "unet")
    shaken(unet_net(unet)).save_pretrained(nets["xl"])
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(folders["flux"] / "transformer")
    shaken(flux_net(num_layers=1, num_single_layers=1)(transformer)).save_pretrained(nets["flux"])
    adapter = write_ip_adapter(folder / "adapter" / "xl.safetensors", unet)
    write_image_encoder(adapter.parent / "image_encoder")
    models = [f"{name}={path}" for name, path in folders.items()]
    flags = [flag for id, net in nets.items() for flag in ("--controlnet", f"{id}:edges={net}")]
    flags += ["--ip-adapter", f"xl={adapter}"]
    with running_server(*models, flags=flags) as (address, http):
        yield Served(address, http, folders, adapter, nets)


def alone(
    folder: Path, seed: int, fields: dict[str, Any], adapter: Path | None = None, scale: float = 1.0
) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name)
        pipeline.set_ip_adapter_scale(scale)
    image = pipeline(
        prompt=PROMPT,
        width=64,
        height=64,
        num_inference_steps=6,
        generator=torch.Generator("cpu").manual_seed(seed),
        **fields,
    ).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("model", "fields"), [("xl", XL), ("flux", FLUX)])
def test_images_equal_the_pipelines(served: Served, model: str, fields: dict[str, Any]) -> None:
    with Client(served.address, timeout=SECONDS) as client:
        result = client.generate(
            PROMPT,
            model=model,
            steps=6,
            seed=SEEDS[0],
            image_count=len(SEEDS),
            scheduler=Scheduler.MODEL,
            **fields,
        )
        plain = client.generate(PROMPT, model=model, steps=6, seed=SEEDS[0]).image.to_numpy()
    found = [image.to_numpy().astype(int) for image in result.images]
    # Each image has two rows, or one; they cannot be in a batch of their own all the time.
    own_rows = 2 if model == "xl" else 1
    assert max(image.replay.rows_in_last_pass for image in result.images) > own_rows
    expected = [alone(served.folders[model], seed, fields) for seed in SEEDS]
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= 2
    assert np.abs(found[0] - expected[1]).max() > 20
    assert np.abs(found[0] - plain.astype(int)).max() > 20, "the fields do nothing"


def pil(seed: int) -> PIL.Image.Image:
    return pil_image(picture(seed))


def test_an_edit_equals_the_pipeline(served: Served) -> None:
    images = [pil(1), pil(2)]
    with Client(served.address, timeout=SECONDS) as client:
        edit = partial(client.generate, PROMPT, model="klein", steps=6, seed=11, exact=True)
        found = edit(reference_images=images).image
        assert (found.width, found.height) == (64, 64)
        again = client.replay(found.replay, images=images).image
    expected = alone(served.folders["klein"], 11, {"image": images})
    assert np.array_equal(found.to_numpy(), expected)
    assert again.replay.pixels_sha256 == found.replay.pixels_sha256
    other = alone(served.folders["klein"], 11, {"image": images[::-1]})
    assert not np.array_equal(other, expected)
    # Over HTTP the pictures of an edit are references.
    files = [io.BytesIO(), io.BytesIO()]
    for file, image in zip(files, images, strict=True):
        image.save(file, "PNG")
    form = {"model": "klein", "prompt": PROMPT, "steps": "6", "seed": "11", "exact": "true"}
    reply = httpx2.post(
        f"http://{served.http}/v1/images/edits",
        data=form,
        files=[("image[]", ("a.png", file.getvalue(), "image/png")) for file in files],
        timeout=SECONDS,
    )
    data = base64.b64decode(reply.raise_for_status().json()["data"][0]["b64_json"])
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(np.asarray(opened.convert("RGB")), expected)


def test_an_image_prompt_equals_the_pipeline(served: Served, tmp_path: Path) -> None:
    image, folder = tmp_path / "style.png", tmp_path / "out"
    pil(3).save(image)
    flags = f"--model xl --steps 6 --seed 11 --exact --scheduler model --ip-adapter-image {image}"
    flags += f" --ip-adapter-scale 0.5 --output {folder}"
    assert main(["generate", PROMPT, "--target", served.address, *flags.split()]) == 0
    fields = {"ip_adapter_image": pil(3)}
    expected = alone(served.folders["xl"], 11, fields, served.adapter, scale=0.5)
    (file,) = folder.iterdir()
    with PIL.Image.open(file) as opened:
        assert np.array_equal(np.asarray(opened), expected)
    full = alone(served.folders["xl"], 11, fields, served.adapter)
    assert np.abs(full - expected).max() > 5


def test_images_that_a_model_does_not_take(served: Served) -> None:
    thin = PIL.Image.new("RGB", (600, 64))
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("xl", {"reference_images": [pil(1)]}, "reference_images"),
        ("flux", {"ip_adapter_image": pil(1)}, "ip_adapter_image"),
        ("klein", {"image": pil(1)}, "image"),
        ("klein", {"reference_images": [pil(1)] * 5}, "reference_images"),
        ("klein", {"reference_images": [pil(1), PIL.Image.new("RGB", (32, 64))]}, "side"),
        ("klein", {"reference_images": [thin]}, "ratio"),
    ]
    reasons = {
        "side": ("reference_images[1]", "must have sides of at least 64 pixels, and is 32×64"),
        "ratio": ("reference_images[0]", "must have sides of at least 64 pixels, and is 128×14"),
    }
    with Client(served.address, timeout=SECONDS) as client:
        for model, fields, what in wrong:
            with pytest.raises(InvalidRequest) as caught:
                client.generate(PROMPT, model=model, **fields)
            (violation,) = caught.value.violations
            field, says = reasons.get(what, (what, ""))
            assert violation.field == field
            assert says in violation.description


def test_the_models_say_what_they_take(served: Served) -> None:
    with Client(served.address, timeout=SECONDS) as client:
        models = {model.id: model for model in client.models()}
    assert models["xl"].kind == "StableDiffusionXLPipeline"
    assert models["flux"].kind == "FluxPipeline"
    assert models["klein"].tasks == (Task.TEXT_TO_IMAGE, Task.EDIT)
    limits = {id: models[id].limits for id in ("xl", "klein")}
    assert [each and each.max_reference_images for each in limits.values()] == [0, 4]
    adapter = {"ip_adapter_image", "ip_adapter_scale"}
    assert adapter <= {*models["xl"].optional_fields}
    assert not adapter & {*models["flux"].optional_fields}
    assert XL.keys() <= {*models["xl"].optional_fields}
    assert FLUX.keys() <= {*models["flux"].optional_fields}
    assert "true_cfg_scale" not in models["xl"].optional_fields
    assert "guidance_rescale" not in models["flux"].optional_fields


def test_each_violation_is_reported(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "xl": {"true_cfg_scale": 3.0, "prompt_3": "a moon", "width": 70, "height": 4096},
        "flux": {"guidance_rescale": 0.5, "max_sequence_length": 513, "width": 72},
    }
    with Client(served.address, timeout=SECONDS) as client:
        for model, fields in wrong.items():
            with pytest.raises(InvalidRequest) as caught:
                client.generate(PROMPT, model=model, **fields)
            assert {each.field for each in caught.value.violations} == fields.keys()
    flags = "--model flux --scheduler ddim --guidance-rescale 0.5 --size 72x64"
    code = main(["generate", PROMPT, "--target", served.address, *flags.split()])
    assert code == 2
    line = capsys.readouterr().err
    for flag in ("--guidance-rescale: model 'flux' does not take it", "--scheduler:", "--size:"):
        assert flag in line


def test_a_client_without_the_sdk_asks_for_a_family_s_fields(
    served: Served, tmp_path: Path
) -> None:
    method = "GenerationService/Generate"
    request = {
        "model": "flux",
        "prompt": PROMPT,
        "negativePrompt": "blue",
        "trueCfgScale": 3.0,
        "maxSequenceLength": 32,
        "scheduler": "SCHEDULER_MODEL",
        "steps": 2,
    }
    recorded = buf_curl(served.address, method, request, tmp_path)["images"][0]["replay"]
    assert {name: recorded["request"][name] for name in request} == request
    data = png(pil(1))
    edit = {"model": "klein", "prompt": PROMPT, "steps": 2, "width": 64, "height": 64}
    images = {"referenceImages": [{"data": base64.b64encode(data).decode()}]}
    reply = buf_curl(served.address, method, {**edit, **images}, tmp_path)
    recorded = reply["images"][0]["replay"]["request"]
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert recorded["referenceImages"] == [{"uploadId": digest}]


EDGES = pil_image(picture(5))


def png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_controlnet_changes_an_image_as_in_its_pipeline(served: Served) -> None:
    file = png(EDGES)
    control = Control("edges", file, scale=0.75, end=0.5)
    with Client(served.address, timeout=SECONDS) as client:
        fields: dict[str, Any] = {"steps": 6, "seed": 11, "scheduler": Scheduler.MODEL}
        result = client.generate(PROMPT, model="xl", controls=[control], **fields)
        plain = client.generate(PROMPT, model="xl", **fields).image.to_numpy().astype(int)
        replayed = client.replay(result.image.replay, images=[file])
        (listed,) = client.adapters("xl")
        with pytest.raises(AdapterNotFound, match="this server has edges"):
            client.generate(PROMPT, model="xl", controls=[Control("pose", file)])
    assert (listed.id, listed.kind, listed.resident) == ("edges", AdapterKind.CONTROLNET, True)
    assert listed.models == ("xl", "flux")
    digest = f"sha256:{hashlib.sha256(file).hexdigest()}"
    recorded = result.image.replay.request.controls
    assert recorded == (Control("edges", UploadedImage(digest), scale=0.75, end=0.5),)
    assert replayed.image.data == result.image.data
    net = diffusers.ControlNetModel.from_pretrained(served.nets["xl"])
    pipeline = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        served.folders["xl"], controlnet=net
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPT,
        image=EDGES,
        controlnet_conditioning_scale=0.75,
        control_guidance_end=0.5,
        width=64,
        height=64,
        num_inference_steps=6,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    wanted, found = np.asarray(expected).astype(int), result.image.to_numpy().astype(int)
    assert np.abs(found - wanted).max() <= 2
    assert np.abs(found - plain).max() > 20, "the ControlNet does nothing"


def test_a_client_without_the_sdk_sends_a_control(served: Served, tmp_path: Path) -> None:
    data = base64.b64encode(png(EDGES)).decode()
    request = {
        "model": "flux",
        "prompt": PROMPT,
        "steps": 2,
        "controls": [{"id": "edges", "image": {"data": data}, "start": 0.5}],
    }
    (image,) = buf_curl(served.address, "GenerationService/Generate", request, tmp_path)["images"]
    (recorded,) = image["replay"]["request"]["controls"]
    assert (recorded["id"], recorded["start"]) == ("edges", 0.5)
    assert recorded["image"]["uploadId"].startswith("sha256:")
