"""``darkroom-server compile`` in real processes."""

import json
import subprocess
import sys

import pytest

from tests.server.app.process import CLEAN

MAIN = """
import dataclasses, json, sys
from darkroom_server import cli, app
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.model_runtime import DenoiserForm

def build_engines(settings):
    print(settings.engine.compile.value, *settings.models.model)
    forms = json.loads(sys.argv[1])
    models = [dataclasses.replace(fake_model(), id=id) for id in forms]
    forms = {id: DenoiserForm(form) for id, form in forms.items()}
    return [FakeEngine([each.with_runtime(denoiser=forms[each.id]) for each in models])]

app.build_engines = build_engines
cli.main(["compile", *sys.argv[2:]])
"""


@pytest.mark.parametrize("second", ["compiled", "eager"])
def test_each_denoiser_is_reported(second: str) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-c", MAIN, json.dumps({"demo": "compiled", "other": second})),
            *("demo", "other=demo", "--compile", "off"),
        ],
        env=CLEAN,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    asked, first, last = result.stdout.splitlines()
    assert asked == "blocking demo other=demo", "whatever the settings say"
    assert first == "ok       demo: its denoiser is compiled"
    if second == "compiled":
        assert (last, result.returncode) == ("ok       other: its denoiser is compiled", 0)
    else:
        assert last.startswith("problem  other: its denoiser stays eager")
        assert result.returncode == 1
