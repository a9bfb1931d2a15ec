"""The fingerprint of a runtime: equal if ``exact`` images are."""

from dataclasses import replace
from typing import Any

from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.model_runtime import ModelRuntime

PLAIN = fake_model().runtime


def layouts(denoiser: bool, vae: bool) -> ModelRuntime:
    return replace(PLAIN, channels_last=denoiser, vae_channels_last=vae)


def test_each_pair_of_layouts_has_its_own_fingerprint() -> None:
    both = (False, True)
    found = {layouts(denoiser, vae).fingerprint for denoiser in both for vae in both}
    assert len(found) == 4
    assert layouts(False, True).fingerprint == layouts(False, True).fingerprint


def test_what_changes_no_byte_changes_no_fingerprint() -> None:
    others: list[dict[str, Any]] = [{"device": "cpu:1"}, {"format_rule": "why"}, {"preset": "max"}]
    for changed in others:
        assert replace(PLAIN, **changed).fingerprint == PLAIN.fingerprint
