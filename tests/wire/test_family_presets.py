"""Models of several families on one engine: each runs as suits it, and callers can read why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tiny_families.flux import write_schnell
from bench.tiny_families.sana import CASES as SANA
from darkroom_client import Client
from tests.engine.tiny import write_tiny_model

from .conftest import READY_SECONDS, LogReader

NOT_SLICED = "attention is sdpa: the model's cannot be sliced"


def test_each_model_says_how_it_runs_and_why(tmp_path: Path) -> None:
    folders = {
        "unet": write_tiny_model(tmp_path / "unet"),
        "flux": write_schnell(tmp_path / "flux"),
        "sana": SANA[0].write(tmp_path / "sana"),
    }
    options = "--port 0 --metrics-port 0 --device cpu --preset frugal --rows 4 --threads 1"
    models = [flag for name, path in folders.items() for flag in ("--model", f"{name}={path}")]
    command = [sys.executable, "-m", "darkroom_server", "serve", *options.split(), *models]
    command += ["--autocast"]  # A risk for Sana.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        log = LogReader(server.stderr)
        try:
            log.located.wait(READY_SECONDS)
            if not log.address:
                pytest.fail(log.join())
            with Client(log.address, insecure=True) as client:
                client.wait_until_ready(READY_SECONDS)
                runtimes = {model.id: model.runtime for model in client.models()}
                for name in folders:
                    assert client.generate("a star", model=name, steps=2).image.data
        finally:
            server.terminate()
            server.wait(60)
    unet, flux, sana = (runtimes[name] for name in folders)
    assert unet is not None
    assert flux is not None
    assert sana is not None
    assert (unet.attention, unet.preset_rule) == ("sliced", "")
    assert (flux.attention, flux.preset_rule) == ("sdpa", NOT_SLICED)
    assert (sana.attention, sana.autocast, sana.preset_rule) == ("sdpa", True, NOT_SLICED)
    entries = [json.loads(line) for line in log.lines if line.startswith("{")]
    rules = {e["model"]: e["preset_rule"] for e in entries if e["event"] == "model loaded"}
    assert rules == {"unet": "", "flux": NOT_SLICED, "sana": NOT_SLICED}
    risks = [(e["model"], e["why"]) for e in entries if "risky" in e["event"]]
    assert risks == [
        ("sana", "--autocast: it would undo the float32 of the model's linear attention")
    ]
