"""Jobs with weighted prompts: equal to diffusers' pipelines, which get compel's embeddings."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_server.core.engine_config import Dtype
from darkroom_server.core.errors import Reason, Violation
from darkroom_server.core.events import Counted, JobFailed, JobFinished
from darkroom_server.core.job import PROMPT_FIELDS, Job, PromptSyntax, SchedulerName
from darkroom_server.core.prompt_syntax import MAX_WINDOWS, check_length, parse

from .conftest import FEW_ROWS, End, LoopUnderTest, config_for, make_job
from .folders import edit_index
from .test_events import counted
from .test_family_parity import NOTICEABLE
from .test_prompt_batches import join_together
from .tiny import write_tiny_model

compel = pytest.importorskip("compel", reason="needs darkroom-server[prompt-weights]")

PROMPT = "a large red star on a blue background"
WEB_WEIGHTS = "a large (red:1.3) star on a (blue:0.6) background"
LONG = (
    "a large red star on a blue background, a green ring, a white square, a small yellow heart. "
    "a blue ring on a white background, a red heart, a (large:1.2) green square, a small star."
)
"""Two windows of the tiny tokenizer's 32 tokens."""

OTHER_LONG = LONG.replace("red", "green")
UNSPLIT = "7" * 300
"""One word without a tokenizer; with it, more tokens than any prompt may have."""

WEIGHTED = PromptSyntax.WEIGHTED


class Alone:
    """diffusers' own pipeline, which gets the embeddings of compel's own reading of a prompt."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.sdxl = hasattr(self.pipeline, "text_encoder_2")
        self._read = (compel.CompelForSDXL if self.sdxl else compel.CompelForSD)(self.pipeline)
        for name in ("compel", "compel_1", "compel_2"):
            if reader := getattr(self._read, name, None):
                reader.conditioning_provider.split_long_text_mode = (
                    compel.SplitLongTextMode.SENTENCES
                )

    @torch.inference_mode()
    def latents(self, job: Job) -> torch.Tensor:
        """The final latents of ``job``."""
        prompts = self._embedded(job) if job.prompt_syntax is WEIGHTED else self._plain(job)
        found = self.pipeline(
            **prompts,
            width=job.width,
            height=job.height,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator().manual_seed(job.seed),
            output_type="latent",
        ).images
        assert isinstance(found, torch.Tensor)
        # The VAE takes the latents of SDXL's pipeline after this, and those of SD's before.
        scale = self.pipeline.vae.config.scaling_factor if self.sdxl else 1.0
        return found / scale

    def _plain(self, job: Job) -> dict[str, Any]:
        second = {"prompt_2": job.prompt_2 or None} if self.sdxl else {}
        return {"prompt": job.prompt, "negative_prompt": job.negative_prompt or None, **second}

    def _embedded(self, job: Job) -> dict[str, Any]:
        texts = {name: as_compel_writes(getattr(job, name)) for name in PROMPT_FIELDS}
        zeros = self.sdxl and self.pipeline.config.force_zeros_for_empty_prompt
        negative = texts["negative_prompt"] or (None if zeros else "")
        second = [texts["prompt_2"] or texts["prompt"]] if self.sdxl else []
        found = self._read(texts["prompt"], *second, negative_prompt=negative)
        # compel pools a text with its brackets and numbers, which are no words.
        bare = self._read(
            *map(without_weights, (texts["prompt"], *second)),
            negative_prompt=None if negative is None else without_weights(negative),
        )
        given = {
            "prompt_embeds": found.embeds,
            "negative_prompt_embeds": found.negative_embeds,
            "pooled_prompt_embeds": bare.pooled_embeds,
            "negative_pooled_prompt_embeds": bare.negative_pooled_embeds,
        }
        return {name: value for name, value in given.items() if value is not None}


def as_compel_writes(text: str) -> str:
    return re.sub(r"\(([^():]+):([\d.]+)\)", r"(\1)\2", text)


def without_weights(text: str) -> str:
    return re.sub(r"\(([^()]+)\)[\d.]+", r"\1", text)


class Served:
    """A tiny model in a loop, and its pipeline alone."""

    def __init__(self, folder: Path) -> None:
        self.alone = Alone(folder)
        self.loop = LoopUnderTest(config_for(folder, rows=FEW_ROWS))

    def error(self, job: Job, wanted: Job | None = None) -> float:
        """How far the served latents of ``job`` are from the pipeline's of ``wanted``."""
        reference = self.alone.latents(wanted or job)
        found = self.loop.latents[job.id, 0]
        return float((found - reference).abs().max() / reference.abs().max())

    def ends_of(self, *jobs: Job) -> dict[str, End]:
        """How ``jobs``, which arrive together, end."""
        return join_together(self.loop, *jobs, before=f"before {jobs[0].id}")

    def run(self, *jobs: Job) -> None:
        """Run ``jobs``, which arrive together."""
        ends = self.ends_of(*jobs)
        assert all(isinstance(end, JobFinished) for end in ends.values()), ends


@pytest.fixture(scope="module", params=["SD", "SDXL", "SDXL without zeros"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    torch.set_num_threads(1)  # The threads share out sums, and with them the last bits.
    made = Served(write(request.param, tmp_path_factory.mktemp("weighted")))
    yield made
    made.loop.close()


def write(kind: str, folder: Path) -> Path:
    if kind == "SD":
        return write_tiny_model(folder)
    write_sdxl(folder)
    if kind == "SDXL without zeros":
        edit_index(folder, force_zeros_for_empty_prompt=False)
    return folder


def job_of(id: str, prompt: str, syntax: PromptSyntax = WEIGHTED, **fields: Any) -> Job:
    usual = {"scheduler": SchedulerName.MODEL, "prompt_syntax": syntax, "steps": 4}
    return make_job(id, prompt=prompt, **{**usual, **fields})


@pytest.fixture
def batches(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, int]]]:
    """For each batch its samples: the job's id, and the tokens of its prompt."""
    runner, seen = served.loop.loop._runner, list[list[tuple[str, int]]]()
    denoise = runner._denoise

    def tokens(sample: Any) -> int:
        if served.alone.sdxl:
            return int(sample.pending.arguments["encoder_hidden_states"].shape[1])
        (length,) = {embedding.hidden.shape[1] for embedding in sample.embeddings}
        return int(length)

    def keep(samples: Any) -> Any:
        seen.append([(sample.job.id, tokens(sample)) for sample in samples])
        return denoise(samples)

    monkeypatch.setattr(runner, "_denoise", keep)
    return seen


def test_mixed_jobs_equal_the_pipeline(
    served: Served, batches: list[list[tuple[str, int]]]
) -> None:
    jobs = [
        job_of("plain-1", PROMPT, PromptSyntax.PLAIN),
        job_of("plain-2", "a green ring", PromptSyntax.PLAIN, negative_prompt="blue", seed=1),
        job_of("no-weights", "a small heart", seed=2),
        job_of("weights", WEB_WEIGHTS, negative_prompt="(green:1.5) ring", steps=6),
        job_of("long-1", LONG, negative_prompt="a (blue:1.2) ring", seed=4),
        job_of("long-2", OTHER_LONG, seed=5, steps=7),
        job_of("long-negative", "a red star", negative_prompt=LONG, seed=6),
        job_of("unguided", LONG, guidance_scale=1.0, seed=7),
    ]
    served.run(*jobs)
    assert {job.id: served.error(job) for job in jobs if served.error(job) > 1e-5} == {}
    window = served.alone.pipeline.tokenizer.model_max_length
    shared = [each for each in batches if len(each) > 1]
    lengths = [{tokens for _, tokens in each} for each in shared]
    assert all(len(each) == 1 for each in lengths)
    assert {window} in lengths
    assert {2 * window} in lengths
    assert any({"plain-1", "weights"} <= {id for id, _ in each} for each in shared)
    assert any({"long-1", "long-2", "long-negative"} <= {id for id, _ in each} for each in shared)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": WEB_WEIGHTS.replace("1.3", "1.1")},
        {"prompt": PROMPT},
        {"negative_prompt": "a ring"},
        {"prompt_syntax": PromptSyntax.PLAIN},
    ],
)
def test_another_prompt_is_noticed(served: Served, change: dict[str, Any]) -> None:
    job = job_of(f"control-{change}", WEB_WEIGHTS)
    served.run(job)
    assert served.error(job) < 1e-5
    assert served.error(job, replace(job, **change)) > NOTICEABLE


def test_the_second_half_of_a_long_prompt_is_read(served: Served) -> None:
    one, other = (
        job_of(f"half-{word}", LONG.replace("small star", f"{word} star"))
        for word in ("large", "blue")
    )
    served.run(one, other)
    latents = [served.loop.latents[job.id, 0] for job in (one, other)]
    assert (latents[0] - latents[1]).abs().max() / latents[0].abs().max() > NOTICEABLE


def test_without_weights_the_bytes_are_those_of_a_plain_prompt(served: Served) -> None:
    syntaxes = {"exact-plain": PromptSyntax.PLAIN, "exact-weighted": WEIGHTED}
    for negative in ("", "blue"):
        jobs = [
            job_of(f"{id}-{negative}", PROMPT, syntax, exact=True, negative_prompt=negative)
            for id, syntax in syntaxes.items()
        ]
        control = job_of(f"exact-control-{negative}", WEB_WEIGHTS, exact=True)
        served.run(*jobs, control)
        plain, weighted, other = (served.loop.image(job.id).image.data for job in [*jobs, control])
        assert weighted == plain
        assert other != plain


def test_the_syntax_is_part_of_what_is_remembered(served: Served) -> None:
    text = "a (red:1.7) star with brackets"
    plain, weighted = job_of("memo-p", text, PromptSyntax.PLAIN), job_of("memo-w", text)
    served.run(plain)
    served.run(weighted)
    served.run(again := replace(weighted, id="memo-again"))
    assert served.error(plain) < 1e-5
    assert served.error(weighted) < 1e-5
    assert torch.equal(*(served.loop.latents[job.id, 0] for job in (weighted, again)))
    assert served.error(weighted, plain) > NOTICEABLE


def test_an_encoded_prompt_is_counted_and_remembered(served: Served) -> None:
    job = job_of("count", f"{WEB_WEIGHTS} once", guidance_scale=1.0)
    served.run(replace(job, id="count-warm"))
    before = counted(served.loop)
    served.run(job)
    after = counted(served.loop)
    assert after[Counted.PROMPTS_ENCODED] == before[Counted.PROMPTS_ENCODED]
    assert after[Counted.PROMPTS_CACHED] > before[Counted.PROMPTS_CACHED]
    assert before[Counted.PROMPTS_ENCODED] > 0


def test_only_plain_prompts_are_truncated(served: Served) -> None:
    text = LONG.replace("(large:1.2)", "large")
    plain, weighted = job_of("cut", text, PromptSyntax.PLAIN), job_of("whole", text)
    served.run(plain, weighted)
    assert served.loop.image(plain.id).image.prompt_truncated
    assert not served.loop.image(weighted.id).image.prompt_truncated
    assert served.error(plain) < 1e-5
    assert served.error(plain, weighted) > NOTICEABLE
    if served.alone.sdxl:
        second = job_of("cut-2", PROMPT, PromptSyntax.PLAIN, prompt_2=text)
        negative = job_of("cut-3", PROMPT, PromptSyntax.PLAIN, negative_prompt_2=text)
        served.run(second, negative)
        assert served.loop.image(second.id).image.prompt_truncated
        assert served.loop.image(negative.id).image.prompt_truncated


def test_a_text_for_each_encoder(served: Served) -> None:
    if not served.alone.sdxl:
        assert "prompt_2" not in served.loop.models["tiny"].info.optional_fields
        return
    job = job_of("second", WEB_WEIGHTS, prompt_2=LONG)
    served.run(job)
    assert served.error(job) < 1e-5
    assert served.error(job, replace(job, prompt_2="")) > NOTICEABLE


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "prompt_2"])
def test_a_prompt_of_too_many_windows_fails_alone(served: Served, field: str) -> None:
    if field not in ("prompt", *served.loop.models["tiny"].info.optional_fields):
        return
    window = served.alone.pipeline.tokenizer.model_max_length
    check_length(UNSPLIT, window)  # The door lets it pass.
    bad_prompt: dict[str, Any] = {"prompt": PROMPT, field: UNSPLIT}
    bad = job_of(f"bad-{field}", **bad_prompt)
    others = [job_of(f"good-{field}-{i}", f"a (red:1.3) star {i}") for i in range(3)]
    ends = served.ends_of(others[0], bad, *others[1:])
    end = ends.pop(bad.id)
    assert all(isinstance(each, JobFinished) for each in ends.values())
    assert isinstance(end, JobFailed)
    assert end.failure.reason is Reason.INVALID_REQUEST
    description = f"needs more than {MAX_WINDOWS} windows of {window} tokens"
    assert end.failure.violations == (Violation(field, description),)
    assert end.failure.message == f"{field}: {description}"
    assert served.loop.progress(bad.id) == []


def test_a_prompt_of_the_most_windows_is_generated(
    served: Served, batches: list[list[tuple[str, int]]]
) -> None:
    window = served.alone.pipeline.tokenizer.model_max_length
    digits = (window - 2) * MAX_WINDOWS
    job, longer = (job_of(f"most-{n}", "7" * n, steps=2) for n in (digits, digits + 1))
    ends = served.loop.run(job, longer)
    assert isinstance(ends[job.id], JobFinished)
    assert isinstance(ends[longer.id], JobFailed)
    assert {tokens for each in batches for id, tokens in each if id == job.id} == {
        MAX_WINDOWS * window
    }


def test_the_record_has_the_syntax_and_its_library(served: Served) -> None:
    weighted, plain = (
        job_of("record-w", WEB_WEIGHTS),
        job_of("record-p", WEB_WEIGHTS, PromptSyntax.PLAIN),
    )
    served.run(weighted, plain)
    versions = {
        job.id: served.loop.image(job.id).image.replay.library_versions for job in (weighted, plain)
    }
    assert versions[weighted.id].keys() - versions[plain.id].keys() == {"compel"}
    info = served.loop.models["tiny"].info
    assert info.options_of(weighted)["prompt_syntax"] is WEIGHTED
    assert "prompt_syntax" not in info.options_of(plain)


@pytest.mark.parametrize("kind", ["SD", "SDXL"])
def test_bfloat16_with_autocast(kind: str, tmp_path: Path) -> None:
    half: dict[str, Any] = {"dtype": Dtype.BFLOAT16, "autocast": True}
    loop = LoopUnderTest(config_for(write(kind, tmp_path), rows=FEW_ROWS, **half))
    try:
        jobs = [job_of("weights", WEB_WEIGHTS), job_of("none", PROMPT), job_of("long", LONG)]
        jobs.append(job_of("plain", PROMPT, PromptSyntax.PLAIN))
        assert all(isinstance(end, JobFinished) for end in loop.run(*jobs).values())
        weights, none, _, plain = (loop.latents[job.id, 0].float() for job in jobs)
        assert (none - plain).abs().max() / plain.abs().max() < 0.05
        assert not torch.equal(weights, plain)
    finally:
        loop.close()


@pytest.mark.parametrize("kind", ["SD", "SDXL"])
def test_without_the_extra(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(kind, tmp_path)
    monkeypatch.setitem(sys.modules, "compel", None)
    loop = LoopUnderTest(config_for(folder, rows=FEW_ROWS))
    try:
        info = loop.models["tiny"].info
        assert "prompt_syntax" not in info.optional_fields
        assert info.fields_without_extra == {"prompt_syntax"}
        plain = job_of("plain", PROMPT, PromptSyntax.PLAIN)
        assert isinstance(loop.run(plain)[plain.id], JobFinished)
    finally:
        loop.close()


def test_with_the_extra(served: Served) -> None:
    info = served.loop.models["tiny"].info
    assert "prompt_syntax" in info.optional_fields
    assert info.fields_without_extra == frozenset()
    assert len(parse(LONG)) == 3
    assert info.limits.prompt_tokens == 32
