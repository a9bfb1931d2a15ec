"""Fields that not every model takes: what each model rejects, and where the others go."""

import math
from dataclasses import fields, replace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from darkroom.v1 import generation_pb2, types_pb2
from darkroom_server.backends.fake_model import fake_flow_model, fake_model
from darkroom_server.core.errors import Failure, Reason, Violation
from darkroom_server.core.job import Job, PromptSyntax
from darkroom_server.core.model import OPTIONAL_FIELDS, ModelInfo
from darkroom_server.service.idempotency import fingerprint
from darkroom_server.service.request import INPUT_FIELDS, GenerationRequest
from darkroom_server.settings import Models
from tests.server.streams import rest
from tests.server.wire import refusal, serving

WEIGHTED = types_pb2.PROMPT_SYNTAX_WEIGHTED

SET: dict[str, Any] = {
    "negative_prompt": "rain",
    "empty_negative_prompt": True,
    "guidance_scale": 0.0,
    "guidance_rescale": 0.0,
    "true_cfg_scale": 0.0,
    "max_sequence_length": 1,
    "prompt_2": "a moon",
    "prompt_3": "a sun",
    "negative_prompt_2": "snow",
    "negative_prompt_3": "hail",
    "prompt_syntax": WEIGHTED,
}
"""Each optional field with a value that counts as set, but ``preview`` and images."""

LONG = "é" * 4097
FLOW_WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"true_cfg_scale": -0.1}, "true_cfg_scale", "must be 0 to 50, not -0.1"),
    ({"true_cfg_scale": 50.1}, "true_cfg_scale", "must be 0 to 50, not 50.1"),
    ({"true_cfg_scale": math.nan}, "true_cfg_scale", "must be 0 to 50, not nan"),
    ({"true_cfg_scale": math.inf}, "true_cfg_scale", "must be 0 to 50, not inf"),
    ({"max_sequence_length": 0}, "max_sequence_length", "must be 1 to 512, not 0"),
    ({"max_sequence_length": 513}, "max_sequence_length", "must be 1 to 512, not 513"),
    ({"max_sequence_length": -1}, "max_sequence_length", "must be 1 to 512, not -1"),
    ({"prompt_2": LONG}, "prompt_2", "must be at most 8192 bytes of UTF-8, and has 8194"),
    ({"negative_prompt_2": LONG}, "negative_prompt_2", "must be at most 8192 bytes of UTF-8"),
    ({"prompt_3": LONG}, "prompt_3", "model 'flow' does not take it; it takes negative_prompt,"),
    (
        {"empty_negative_prompt": True, "negative_prompt": "rain"},
        "empty_negative_prompt",
        "must not be set with a negative_prompt",
    ),
    ({"guidance_rescale": 0.5}, "guidance_rescale", "model 'flow' does not take it"),
    ({"guidance_rescale": 7.0}, "guidance_rescale", "model 'flow' does not take it"),
    ({"prompt_syntax": 99}, "prompt_syntax", "99 is not a prompt syntax that this server knows"),
    ({"scheduler": types_pb2.SCHEDULER_EULER}, "scheduler", "model 'flow' offers flow_match_euler"),
]
"""What the flow model rejects: the request's fields, the violation's field and its description."""


def served(model: ModelInfo, *, auto: bool = True) -> Any:
    return serving(
        fake={"models": [model], "auto": auto}, models=Models(model=(f"{model.id}=fake",))
    )


def model_taking(*names: str) -> ModelInfo:
    return replace(fake_flow_model("some"), optional_fields=frozenset(names))


def test_the_table_has_every_optional_field() -> None:
    assert {*SET, "preview", *INPUT_FIELDS} == set(OPTIONAL_FIELDS)


@pytest.mark.parametrize("name", SET)
async def test_a_field_that_the_model_does_not_take_is_rejected(name: str) -> None:
    value = {name: SET[name]}
    others = [other for other in OPTIONAL_FIELDS if other != name]
    async with served(model_taking(*others)) as wire:
        error = await refusal(wire.generate(**value))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        says = f"model 'some' does not take it; it takes {', '.join(others)}"
        assert error.violations == {name: says}
        estimate = generation_pb2.EstimateGenerationRequest(
            generation=generation_pb2.GenerateRequest(prompt="a star", **value)
        )
        assert (await refusal(wire.generation.EstimateGeneration(estimate))).violations.keys() == {
            name
        }
        assert wire.submitted.empty()
        assert (await wire.generate()).images
    async with served(model_taking(name)) as wire:
        assert (await wire.generate(**value)).images


async def test_previews_of_a_model_without_are_rejected() -> None:
    async with served(model_taking("guidance_scale")) as wire:
        error = await refusal(rest(wire.stream(preview_every=2)))
        says = "model 'some' does not take it; it takes guidance_scale"
        assert error.violations == {"preview.every_steps": says}
        assert await rest(wire.stream(preview_every=0))
    async with served(model_taking("preview")) as wire:
        assert await rest(wire.stream(preview_every=2))


async def test_a_model_may_take_no_optional_field() -> None:
    async with served(model_taking()) as wire:
        error = await refusal(wire.generate(**SET))
        assert error.violations == dict.fromkeys(
            SET, "model 'some' does not take it; it takes no optional field"
        )
        assert (await wire.generate(prompt_syntax=types_pb2.PROMPT_SYNTAX_PLAIN)).images


async def test_each_violation_names_its_field() -> None:
    async with served(fake_flow_model()) as wire:
        for sent, name, description in FLOW_WRONG:
            error = await refusal(wire.generate(**sent))
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT, sent
            (violation,) = error.detail(error_details_pb2.BadRequest).field_violations
            assert violation.field == name, sent
            assert violation.description.startswith(description), violation
        assert wire.submitted.empty()


async def test_all_violations_come_at_once() -> None:
    wrong: dict[str, Any] = {
        "prompt_2": LONG,
        "prompt_3": "a sun",
        "empty_negative_prompt": True,
        "guidance_scale": math.nan,
        "true_cfg_scale": -1.0,
        "max_sequence_length": 0,
        "guidance_rescale": 2.0,
        "prompt_syntax": WEIGHTED,
    }
    async with served(fake_flow_model()) as wire:
        error = await refusal(wire.generate(negative_prompt="rain", **wrong))
    assert set(error.violations) == set(wrong)


async def test_a_weighted_prompt_that_cannot_be_parsed_is_rejected() -> None:
    wrong = {
        "prompt": "a (red:x) circle",
        "negative_prompt": "a [blue circle",
        "prompt_2": "a red) circle",
        "negative_prompt_3": "(:1.2)",
    }
    everything = replace(fake_flow_model("some"), optional_fields=frozenset(OPTIONAL_FIELDS))
    async with served(everything) as wire:
        for name, text in wrong.items():
            error = await refusal(
                wire.generate(**{"prompt": "a star", name: text, "prompt_syntax": WEIGHTED})
            )
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT
            assert error.violations.keys() == {name}
            assert error.violations[name].startswith("character ")
        error = await refusal(wire.generate(**wrong, steps=0, prompt_syntax=WEIGHTED))
        assert error.violations.keys() == {*wrong, "steps"}
        assert wire.submitted.empty()
        assert (await wire.generate(**wrong)).images
        assert (await wire.generate("a (red:1.3) circle", prompt_syntax=WEIGHTED)).images
    # A model without the syntax says so, and does not parse.
    async with served(fake_flow_model()) as wire:
        error = await refusal(wire.generate("a (red:x) circle", prompt_syntax=WEIGHTED))
        assert error.violations.keys() == {"prompt_syntax"}


async def test_a_field_whose_extra_is_not_installed_names_it() -> None:
    model = replace(fake_model("some"), fields_without_extra=frozenset({"prompt_syntax"}))
    async with served(model) as wire:
        error = await refusal(wire.generate("a (red:x) star", prompt_syntax=WEIGHTED))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations == {
            "prompt_syntax": "model 'some' takes it only if the server has the extra "
            "prompt-weights: pip install 'darkroom-server[prompt-weights]'"
        }
        assert (await wire.generate("a (red:x) star")).images


def weighted_model() -> ModelInfo:
    model = fake_model("some")
    return replace(model, optional_fields=model.optional_fields | {"prompt_syntax"})


async def test_a_weighted_prompt_that_is_surely_too_long_is_rejected() -> None:
    most = " ".join(["a (star:1.2)"] * 300)  # Eight windows of 75 words.
    says = "needs more than 8 windows of 77 tokens"
    async with served(weighted_model()) as wire:
        for wrong in ({"prompt": f"{most} a"}, {"prompt": "a", "negative_prompt": f"{most} a"}):
            error = await refusal(wire.generate(**wrong, prompt_syntax=WEIGHTED))
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT
            assert error.violations == {list(wrong)[-1]: says}
        assert wire.submitted.empty()
        assert (await wire.generate(f"{most} ... (,:1.2)", prompt_syntax=WEIGHTED)).images
        assert (await wire.generate(f"{most} a")).images


async def test_a_prompt_that_the_engine_finds_too_long_is_an_invalid_argument() -> None:
    violation = Violation("prompt", "too long")
    failure = Failure(Reason.INVALID_REQUEST, "prompt: too long", violations=(violation,))
    async with served(weighted_model(), auto=False) as wire:
        call = wire.generating("7" * 900, prompt_syntax=WEIGHTED)
        job = await wire.submitted.get()
        wire.engine.fail(job.id, failure)
        error = await refusal(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations == {"prompt": "too long"}


async def test_guidance_rescale_is_0_to_1() -> None:
    async with served(model_taking("guidance_rescale")) as wire:
        for value in (-0.1, 1.1, math.nan):
            error = await refusal(wire.generate(guidance_rescale=value))
            assert error.violations == {"guidance_rescale": f"must be 0 to 1, not {value:g}"}
        for value in (0.0, 1.0):
            assert (await wire.generate(guidance_rescale=value)).images


async def test_bounds_are_inclusive() -> None:
    right: list[dict[str, Any]] = [
        {"true_cfg_scale": 0.0, "max_sequence_length": 1},
        {"true_cfg_scale": 50.0, "max_sequence_length": 512},
        {"prompt_2": "é" * 4096, "negative_prompt_2": "n" * 8192},
    ]
    async with served(fake_flow_model()) as wire:
        for sent in right:
            assert (await wire.generate(**sent)).images


async def test_every_field_reaches_the_engine() -> None:
    everything = replace(fake_flow_model("some"), optional_fields=frozenset(OPTIONAL_FIELDS))
    sent = {
        "negative_prompt": "rain",
        "guidance_scale": 0.5,
        "guidance_rescale": 0.25,
        "true_cfg_scale": 4.5,
        "max_sequence_length": 77,
        "prompt_2": "a moon",
        "prompt_3": "a sun",
        "negative_prompt_2": "snow",
        "negative_prompt_3": "hail",
    }
    async with served(everything) as wire:
        await wire.generate("a (star:1.2)", prompt_syntax=WEIGHTED, **sent)
        await wire.generate(empty_negative_prompt=True)
        job, other = [await wire.submitted.get() for _ in range(2)]
    assert {name: getattr(job, name) for name in sent} == sent
    assert (job.prompt, job.prompt_syntax) == ("a (star:1.2)", PromptSyntax.WEIGHTED)
    assert (job.empty_negative_prompt, job.has_negative_prompt) == (False, True)
    assert other.prompt_syntax is PromptSyntax.PLAIN
    assert (other.empty_negative_prompt, other.has_negative_prompt) == (True, True)


async def test_unset_fields_are_the_models_defaults() -> None:
    flow = fake_flow_model()
    odd = replace(
        flow, defaults=replace(flow.defaults, true_cfg_scale=4.1, max_sequence_length=256)
    )
    for model, scale, length in ((odd, 4.1, 256), (fake_model(), 1.0, None)):
        async with served(model) as wire:
            await wire.generate()
            job = await wire.submitted.get()
        assert job.true_cfg_scale == pytest.approx(scale)
        assert job.max_sequence_length == length
        assert (job.guidance_rescale, job.prompt_2, job.negative_prompt_3) == (0.0, "", "")
        assert not job.has_negative_prompt


async def test_what_a_job_takes_depends_on_how_its_model_is_guided() -> None:
    """A guided image of the flow model takes two calls of one row; the other's one call of two."""
    guided = {"true_cfg_scale": 4.0, "negative_prompt": "rain"}
    model = fake_flow_model()
    async with served(model) as wire:
        rows = [
            (await wire.generate(**sent)).images[0].replay.rows_in_last_pass
            for sent in ({}, guided, {"guidance_scale": 7.5})
        ]
        plain, twice, embedded = [await wire.submitted.get() for _ in range(3)]
    assert rows == [1, 1, 1]
    assert [model.denoiser_calls(job) for job in (plain, twice, embedded)] == [4, 8, 4]
    async with served(fake_model()) as wire:
        rows = [
            (await wire.generate(**sent)).images[0].replay.rows_in_last_pass
            for sent in ({}, {"guidance_scale": 1.0})
        ]
    assert rows == [2, 1]


@pytest.mark.parametrize("embed", [False, True])
async def test_a_replay_record_has_what_the_model_takes(embed: bool) -> None:
    sent: dict[str, Any] = {
        "empty_negative_prompt": True,
        "prompt_2": "a moon",
        "true_cfg_scale": 4.5,
        "max_sequence_length": 77,
        "embed_record": embed,
        "seed": 7,
    }
    async with served(fake_flow_model()) as wire:
        for fields_sent in (sent, {"seed": 8}):
            image = (await wire.generate(**fields_sent)).images[0]
            request = image.replay.request
            assert (await wire.generation.Generate(request)).images[0].data == image.data
            assert request.true_cfg_scale == fields_sent.get("true_cfg_scale", 1.0)
            assert request.max_sequence_length == fields_sent.get("max_sequence_length", 512)
            assert request.prompt_2 == fields_sent.get("prompt_2", "")
            assert request.empty_negative_prompt is fields_sent.get("empty_negative_prompt", False)
            assert not request.HasField("guidance_rescale")
        first, again, *_ = [await wire.submitted.get() for _ in range(4)]
        ours = {"id", "request_id", "submitted_at"}
        for field in fields(Job):
            if field.name not in ours:
                assert getattr(first, field.name) == getattr(again, field.name), field.name


async def test_a_record_sets_no_guidance_that_the_model_does_not_take() -> None:
    async with served(model_taking("preview")) as wire:
        image = (await wire.generate(seed=7)).images[0]
        assert not image.replay.request.HasField("guidance_scale")
        assert (await wire.generation.Generate(image.replay.request)).images[0].data == image.data


@pytest.mark.parametrize("name", sorted({*SET, "preview_every"} - {"prompt_syntax"}))
def test_the_fingerprint_has_every_optional_field_but_previews(name: str) -> None:
    plain = GenerationRequest(prompt="a star")
    changed = replace(plain, **{name: SET.get(name, 2)})
    assert (fingerprint(plain) == fingerprint(changed)) is (name == "preview_every")


def test_the_fingerprint_has_the_syntax() -> None:
    plain = GenerationRequest(prompt="a star")
    assert fingerprint(plain) != fingerprint(replace(plain, prompt_syntax="weighted"))


async def test_another_optional_field_is_another_request() -> None:
    async with served(fake_flow_model()) as wire:
        await wire.generate(request_id="mine", seed=7, true_cfg_scale=2.0)
        error = await refusal(wire.generate(request_id="mine", seed=7, true_cfg_scale=2.5))
        assert error.info.reason == "REQUEST_CONFLICT"
        assert (await wire.generate(request_id="mine", seed=7, true_cfg_scale=2.0)).images
        await wire.submitted.get()
        assert wire.submitted.empty()
