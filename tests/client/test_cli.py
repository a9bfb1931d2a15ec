"""The command line, through its ``main`` and the real wire."""

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import PIL.Image
import PIL.PngImagePlugin
import pytest

import darkroom_client
from darkroom.v1 import model_pb2
from darkroom_client import (
    TLS,
    Client,
    DarkroomError,
    EngineStatus,
    Estimate,
    GenerationFailed,
    GenerationRequest,
    ModelState,
    ModelStatus,
    Overloaded,
    PromptSyntax,
    ReplayRecord,
    Scheduler,
    ServerState,
    ServerStatus,
    TooLarge,
    Unavailable,
)
from darkroom_client._types.model import OPTIONAL_FIELDS
from darkroom_client._wire.models import decode_model
from darkroom_client.cli import main
from darkroom_client.cli._arguments import parse
from darkroom_client.cli._connect import _options
from darkroom_client.cli._exit_codes import exit_code
from darkroom_client.cli._flags import PHRASES
from darkroom_client.cli.commands._models import _row
from darkroom_client.cli.commands._names import distinct, slug
from darkroom_client.cli.commands._top import _lines
from darkroom_client.cli.terminal._capability import QUERY
from darkroom_client.cli.terminal._halfblocks import check_pillow
from darkroom_client.cli.terminal._picture import _sixel
from darkroom_client.testing import Behaviour, FakeServer, JobState, fake_model
from darkroom_server.settings import Security
from tests.server.security.certificates import Authority
from tests.server.wire import serving

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run each command in its own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def target(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the server of each command in the environment."""
    monkeypatch.setenv("DARKROOM_TARGET", fake.target)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_images_land_in_the_folder(capsys: Capture, here: Path) -> None:
    code = main(["generate", "A large, yellow star!", "-o", "out", "--seed", "7", "--count", "2"])

    assert code == 0
    assert files(here / "out") == ["a-large-yellow-star-7.png", "a-large-yellow-star-8.png"]
    with PIL.Image.open(here / "out" / "a-large-yellow-star-7.png") as picture:
        assert picture.format == "PNG"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{Path('out/a-large-yellow-star-7.png')}  seed 7  0.01 s"
    assert len(lines) == 2


def test_verbose_lines_have_the_stages(capsys: Capture) -> None:
    assert main(["generate", "a star", "--seed", "7", "-v"]) == 0

    assert capsys.readouterr().out == (
        "a-star-7.png  seed 7  queue 0.001  encode_prompt 0.001  denoise 0.001  decode 0.001  "
        "encode_image 0.001  total 0.005 s\n"
    )


def test_every_option_reaches_the_server(fake: FakeServer, here: Path) -> None:
    options = "--steps 9 --guidance 3.5 --seed 0 --size 64x32 --count 2 --scheduler heun"
    options += " --format jpeg --quality 80 --negative rain --model demo --exact"

    assert main(["generate", "a star", *options.split()]) == 0

    sent = fake.requests[0]
    assert (sent.steps, sent.guidance_scale, sent.seed) == (9, 3.5, 0)
    assert (sent.width, sent.height, sent.image_count, sent.quality) == (64, 32, 2, 80)
    assert (sent.negative_prompt, sent.model, sent.exact) == ("rain", "demo", True)
    assert files(here) == ["a-star-0.jpg", "a-star-1.jpg"]


def test_optional_fields_reach_a_model_that_takes_them(here: Path) -> None:
    flags = "--true-cfg-scale 4.5 --guidance-rescale 0.25 --max-sequence-length 77"
    flags += " --prompt-2 moon --prompt-3 sun --negative-2 snow --negative-3 hail"
    flags += " --empty-negative --prompt-syntax weighted"
    sent = GenerationRequest(
        "a star",
        true_cfg_scale=4.5,
        guidance_rescale=0.25,
        max_sequence_length=77,
        prompt_2="moon",
        prompt_3="sun",
        negative_prompt_2="snow",
        negative_prompt_3="hail",
        empty_negative_prompt=True,
        prompt_syntax="weighted",
        image_count=1,
        format="png",
    )
    with FakeServer(models=[fake_model(optional_fields=OPTIONAL_FIELDS)]) as fake:
        target = ["--target", fake.target]
        for command in ("generate", "submit"):
            assert main([command, "a star", *flags.split(), *target]) == 0
        assert main(["estimate", "a star", *flags.split(), *target]) == 0
        for request in fake.requests:
            assert (
                dataclasses.replace(request, seed=None, request_id=None, embed_record=False) == sent
            )
        assert len(fake.requests) == 2
        (picture,) = here.glob("*.png")
        assert main(["replay", str(picture), *target]) == 0
        assert fake.requests[-1].prompt_syntax is PromptSyntax.WEIGHTED
        assert fake.requests[-1].true_cfg_scale == 4.5


def test_a_flag_that_the_model_does_not_take_is_named(capsys: Capture) -> None:
    flags = "--true-cfg-scale 4.5 --prompt-2 moon --negative-3 hail --prompt-syntax weighted"

    assert main(["generate", "a star", *flags.split()]) == 2

    err = capsys.readouterr().err
    for flag in ("--true-cfg-scale", "--prompt-2", "--negative-3", "--prompt-syntax"):
        assert f"{flag}: model 'demo' does not take it; it takes negative_prompt" in err


def test_prompts_from_arguments_file_and_stdin(
    fake: FakeServer, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "prompts.txt").write_text("from a file\n\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin\n  and again \n"))

    assert main(["generate", "--file", "prompts.txt", "an argument", "-", "-o", "out"]) == 0

    prompts = {request.prompt for request in fake.requests}
    assert prompts == {"from a file", "an argument", "from stdin", "and again"}
    assert len({request.seed for request in fake.requests}) == 4
    assert len(files(here / "out")) == 4


def test_no_prompt_is_a_usage_error(capsys: Capture) -> None:
    assert main(["generate"]) == 2
    assert "no prompt" in capsys.readouterr().err


def test_json_is_one_object_per_line(capsys: Capture, fake: FakeServer) -> None:
    error = GenerationFailed("the image came out black", reason="NON_FINITE")
    fake.script(Behaviour(error=error, error_at_step=1))

    code = main(["generate", "bad", "good", "--json", "--seed", "7", "--concurrency", "1"])

    assert code == 7
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["prompt"] == "bad"
    assert first["error"]["kind"] == "GenerationFailed"
    assert first["error"]["reason"] == "NON_FINITE"
    assert (second["path"], second["seed"]) == ("good-7.png", 7)
    assert second["seconds"]["denoise"] == 0.001


def test_one_failure_does_not_affect_the_others(
    capsys: Capture, fake: FakeServer, here: Path
) -> None:
    fake.script(Behaviour(error=TooLarge("it does not fit")))

    code = main(["generate", "bad", "good", "--seed", "7", "--concurrency", "1"])

    assert code == 6
    assert files(here) == ["good-7.png"]
    assert "darkroom: 'bad': it does not fit" in capsys.readouterr().err


def test_a_full_queue_is_waited_out_and_reported(
    capsys: Capture, fake: FakeServer, here: Path
) -> None:
    full = Behaviour(error=Overloaded("the queue is full", retry_after=0.01))
    fake.script(full, full)

    assert main(["generate", "one", "two", "--seed", "7"]) == 0

    assert files(here) == ["one-7.png", "two-7.png"]
    assert capsys.readouterr().err == "darkroom: waits: the server's queue is full\n"


def test_a_loading_server_is_waited_for_and_reported(
    capsys: Capture, fake: FakeServer, here: Path
) -> None:
    loading = Unavailable("loading", reason="MODEL_LOADING", retry_after=0.01)
    fake.script(*[Behaviour(error=loading)] * 8)

    assert main(["generate", "one", "--seed", "7"]) == 0

    assert files(here) == ["one-7.png"]
    assert capsys.readouterr().err == "darkroom: waits: the model is loading\n"


def test_generate_has_a_time_limit_only_without_a_terminal(fake: FakeServer, here: Path) -> None:
    main(["generate", "one"])
    on_a_terminal(here, "generate", "two")

    limits = [job._ends_at < math.inf for job in fake.jobs]
    assert limits == [True, False]


def test_existing_files_are_an_error_before_the_work(
    capsys: Capture, fake: FakeServer, here: Path
) -> None:
    (here / "a-star-8.png").write_text("precious")

    assert main(["generate", "a star", "--seed", "7", "--count", "2"]) == 8
    assert "a-star-8.png exists; --overwrite" in capsys.readouterr().err
    assert fake.requests == ()

    assert main(["generate", "a star", "--seed", "7", "--count", "2", "--overwrite"]) == 0
    assert (here / "a-star-8.png").read_bytes().startswith(b"\x89PNG")


def test_a_withheld_image_is_a_failure(capsys: Capture, fake: FakeServer, here: Path) -> None:
    fake.script(Behaviour(withheld=True))

    assert main(["generate", "a star"]) == 7
    assert "withheld" in capsys.readouterr().err
    assert files(here) == []


def test_a_truncated_prompt_is_reported(capsys: Capture, fake: FakeServer) -> None:
    fake.script(Behaviour(prompt_truncated=True))

    assert main(["generate", "a star"]) == 0
    assert "too long" in capsys.readouterr().out


def record(seed: str = "7") -> None:
    assert main(["generate", "a star", "--seed", seed, "--record"]) == 0


def test_a_record_is_reproduced_identically(capsys: Capture, here: Path) -> None:
    record()
    assert files(here) == ["a-star-7.json", "a-star-7.png"]
    capsys.readouterr()

    assert main(["replay", "a-star-7.json", "-o", "again.png"]) == 0

    assert capsys.readouterr().out.startswith("identical  seed 7  sha256 ")
    assert (here / "again.png").read_bytes() == (here / "a-star-7.png").read_bytes()


def test_a_picture_is_its_own_record(capsys: Capture, here: Path) -> None:
    assert main(["generate", "a star", "--seed", "7"]) == 0
    assert files(here) == ["a-star-7.png"]
    capsys.readouterr()

    assert main(["replay", "a-star-7.png", "-o", "again.png"]) == 0

    assert capsys.readouterr().out.startswith("identical  seed 7  sha256 ")
    assert (here / "again.png").read_bytes() == (here / "a-star-7.png").read_bytes()


def test_pictures_without_a_record(capsys: Capture, here: Path) -> None:
    assert main(["generate", "a star", "--seed", "7", "--no-embed-record"]) == 0
    assert b"a star" not in (here / "a-star-7.png").read_bytes()
    assert main(["generate", "a star", "--seed", "7", "--format", "raw_rgb"]) == 0

    assert main(["replay", "a-star-7.png"]) == 2
    assert "a picture without a replay record" in capsys.readouterr().err
    assert main(["replay", "a-star-7.rgb"]) == 2
    assert re.search("not a replay record|neither a replay record", capsys.readouterr().err)


def changed_picture(here: Path, change: int) -> None:
    """Change one pixel of the star and of its records, as another machine might have made it."""
    with PIL.Image.open(here / "a-star-7.png") as picture:
        old = picture.text["darkroom-record"]  # type: ignore[attr-defined]
        pixels = picture.convert("RGB")
    red, green, blue = pixels.getpixel((3, 3))  # type: ignore[misc]
    pixels.putpixel((3, 3), (red, green ^ change, blue))
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    record = {**json.loads(old), "pixels_sha256": digest}
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("darkroom-record", json.dumps(record))
    pixels.save(here / "a-star-7.png", pnginfo=info)
    (here / "a-star-7.json").write_text(json.dumps(record))


@pytest.mark.parametrize("named", ["a-star-7.png", "a-star-7.json"])
def test_a_replay_that_is_nearly_the_same_says_how_near(
    capsys: Capture, here: Path, named: str
) -> None:
    record()
    changed_picture(here, change=1)
    capsys.readouterr()

    assert main(["replay", named]) == 9

    # One of 64 × 64 × 3 values differs by 1.
    assert capsys.readouterr().out.startswith("same to 1 of 255 (89 dB)  seed 7; recorded -> now:")


def test_a_replay_that_is_far_from_the_same_says_how_far(capsys: Capture, here: Path) -> None:
    record()
    changed_picture(here, change=128)
    assert main(["replay", "a-star-7.png"]) == 9
    flat = PIL.Image.new("RGB", (64, 64), (128, 128, 128))
    document = json.loads((here / "a-star-7.json").read_text())
    document["pixels_sha256"] = hashlib.sha256(flat.tobytes()).hexdigest()
    (here / "a-star-7.json").write_text(json.dumps(document))
    flat.save(here / "a-star-7.png")
    capsys.readouterr()

    assert main(["replay", "a-star-7.json"]) == 1

    assert re.match(r"different by \d+ of 255 \(\d+ dB\)  seed 7", capsys.readouterr().out)


def test_a_picture_of_another_record_is_not_compared(capsys: Capture, here: Path) -> None:
    record()
    changed_picture(here, change=1)
    document = json.loads((here / "a-star-7.json").read_text())
    document["pixels_sha256"] = "0" * 64
    (here / "a-star-7.json").write_text(json.dumps(document))
    capsys.readouterr()

    assert main(["replay", "a-star-7.json"]) == 1

    assert capsys.readouterr().out.startswith("different  seed 7; recorded -> now:")


def test_a_record_without_exact_comes_with_advice(capsys: Capture) -> None:
    record()
    (line,) = capsys.readouterr().err.splitlines()
    assert "--exact" in line
    assert main(["generate", "a star", "--seed", "8", "--record", "--exact"]) == 0
    assert main(["generate", "a star", "--seed", "9"]) == 0
    assert capsys.readouterr().err == ""


def test_a_different_replay_prints_what_differs(capsys: Capture, here: Path) -> None:
    record()
    path = here / "a-star-7.json"
    document = json.loads(path.read_text())
    document.update(model_revision="r1", dtype="float16", pixels_sha256="0" * 64)
    document["library_versions"]["torch"] = "2.12.0"
    path.write_text(json.dumps(document))
    capsys.readouterr()

    assert main(["replay", "a-star-7.json"]) == 1

    out = capsys.readouterr().out
    assert "different  seed 7" in out
    assert "model_revision: r1 -> fake" in out
    assert "dtype: float16 -> float32" in out
    assert "library_versions.torch: 2.12.0 -> -" in out
    assert "without --exact" in out
    assert files(here) == ["a-star-7.json", "a-star-7.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.json"], 8, "No such file"),
        (["notes.txt"], 2, "not a replay record"),
        (["a-star-7.json", "-o", "again.jpg"], 2, "image is in png"),
        (["a-star-7.json", "-o", "a-star-7.png"], 8, "exists"),
    ],
)
def test_replays_that_fail(
    capsys: Capture, fake: FakeServer, arguments: list[str], code: int, words: str
) -> None:
    record()
    Path("notes.txt").write_text("no record")

    assert main(["replay", *arguments]) == code

    captured = capsys.readouterr()
    assert any(word in captured.err for word in words.split("|"))
    assert len(fake.requests) == 1


def test_models_are_tab_separated_in_a_pipe(capsys: Capture, fake: FakeServer) -> None:

    assert main(["models"]) == 0

    (line,) = capsys.readouterr().out.splitlines()
    assert line.split("\t") == [
        "demo",
        "resident",
        "no",
        "1.00 GiB",
        "-",
        "64x64",
        "4",
        "7.5",
        "euler",
        "fake float32 fast eager",
        " ".join(Scheduler),
        "negative_prompt guidance_scale preview",
        "-",
    ]


def test_models_say_why_they_run_so(capsys: Capture) -> None:
    model = fake_model()
    assert model.runtime is not None
    runtime = dataclasses.replace(
        model.runtime, preset_rule="the default on a GPU", format_rule="the GPU has bfloat16"
    )
    with FakeServer(models=[dataclasses.replace(model, runtime=runtime)]) as fake:
        assert main(["models", "--target", fake.target]) == 0
    assert capsys.readouterr().out.strip().endswith("\tthe default on a GPU; the GPU has bfloat16")


def test_a_loading_model_has_only_a_name() -> None:
    message = model_pb2.Model(id="big", ready=False)

    assert _row(decode_model(message))[:6] == ("big", "loading", "no", "-", "-", "-")


def test_models_as_json(capsys: Capture) -> None:
    assert main(["models", "--json"]) == 0

    (model,) = json.loads(capsys.readouterr().out)
    assert (model["id"], model["limits"]["max_rows"]) == ("demo", 8)


def test_waiting(capsys: Capture, fake: FakeServer) -> None:
    assert main(["wait", "--timeout", "30"]) == 0
    assert capsys.readouterr().out == f"ready: {fake.target}\n"

    fake.state = ServerState.LOADING
    assert main(["wait", "--timeout", "0.2"]) == 3
    assert fake.target in capsys.readouterr().err


def test_a_target_on_the_command_line_overrides_the_environment(capsys: Capture) -> None:
    with FakeServer() as gone:
        pass

    assert main(["models", "--target", gone.target, "--timeout", "0.5"]) == 3
    assert gone.target in capsys.readouterr().err


def test_a_token_without_tls_is_a_usage_error(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeServer(token="secret") as strict:
        assert main(["models", "--target", strict.target]) == 5
        monkeypatch.setenv("DARKROOM_TOKEN", "secret")
        assert main(["models", "--target", strict.target]) == 2
        assert "insecure" in capsys.readouterr().err
        assert main(["models", "--target", strict.target, "--insecure"]) == 0


def test_certificates_of_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_CA", "env.pem")

    def tls(*flags: str) -> TLS | None:
        found: TLS | None = _options(parse(["models", *flags]))["tls"]
        return found

    assert tls() is None  # the environment is the client's to read
    assert tls("--tls") == TLS(ca="env.pem")
    assert tls("--server-name", "a.test") == TLS(ca="env.pem", server_name="a.test")
    assert tls("--ca", "ca.pem") == TLS(ca=Path("ca.pem"))
    both = tls("--cert", "me.pem", "--key", "me.key")
    assert both == TLS(ca="env.pem", cert=Path("me.pem"), key=Path("me.key"))
    assert main(["models", "--cert", "me.pem"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [["generate", "a star", "--size", "big"], ["generate", "a", "--scheduler", "x"], ["none"], []],
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_help_lists_the_exit_codes(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--help"])
    assert ended.value.code == 0
    assert "exit codes:" in capsys.readouterr().out


def test_every_error_has_an_exit_code() -> None:
    kinds = [getattr(darkroom_client, name) for name in darkroom_client.__all__]
    errors = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, DarkroomError)]

    assert all(1 < exit_code(kind("")) < 9 for kind in errors)


def test_without_rich_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert main(["models"]) == 2
    assert "pip install 'darkroom-client[cli]'" in capsys.readouterr().err


def test_an_interrupt_exits_with_130_and_cancels_the_job(fake: FakeServer, here: Path) -> None:
    fake.script(default=Behaviour(hold=threading.Event()))
    command = [sys.executable, "-m", "darkroom_client.cli", "generate", "a star", "a circle"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=here, env=os.environ
    ) as running:
        fake.wait_for(lambda: len(fake.jobs) == 2, timeout=60)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)

    assert running.returncode == 130
    assert (out, err) == (b"", b"darkroom: interrupted\n")
    assert files(here) == []
    assert [job.state for job in fake.jobs] == [JobState.CANCELLED] * 2


@pytest.mark.parametrize(
    "arguments",
    [["models"], ["generate", "a star", "--json"], ["generate", "a star"], ["status"]],
)
def test_a_closed_pipe_is_not_an_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "darkroom_client.cli", *arguments]

    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=os.environ, timeout=60, check=False
    )
    os.close(writer)

    assert (done.returncode, done.stderr.decode()) == (141, "")


def on_a_terminal(
    here: Path,
    *arguments: str,
    answer: str = "",
    interrupt_at: str = "",
) -> str:
    """The output of a command on a terminal of 80 columns.

    The terminal sends ``answer`` to the question what it can show, and an interrupt when the output
    contains ``interrupt_at``.
    """
    reader, writer = os.openpty()
    command = [sys.executable, "-m", "darkroom_client.cli", *arguments]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    keyboard = writer if answer else subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=keyboard, stdout=writer, cwd=here, env=environment
    ) as running:
        os.close(writer)
        written = b""
        # Linux reports the end of a pseudo-terminal as an input/output error.
        with contextlib.suppress(OSError):
            while part := os.read(reader, 65536):
                asked, written = QUERY in written, written + part
                if answer and not asked and QUERY in written:
                    os.write(reader, answer.encode())
                if interrupt_at and interrupt_at in written.decode(errors="ignore"):
                    interrupt_at = ""
                    running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0
    os.close(reader)
    return written.decode()


def test_a_terminal_gets_bars_and_whole_lines(fake: FakeServer, here: Path) -> None:
    fake.script(default=Behaviour(queue=1, step_seconds=0.15))

    written = on_a_terminal(here, "generate", "a star", "a circle", "--seed", "7")

    for words in ("1 before", "it/s", "step", "/4", "2/2"):
        assert words in written
    for name in ("a-star-7.png", "a-circle-7.png"):
        # Only the end of the style is between the two: the bars did not break the line.
        assert f"{name}\x1b[0m  seed 7  0.01 s" in written
    # The last picture, and the closing line.
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written).split("\r\n")
    assert plain[-3] == "▀" * 32
    assert re.fullmatch(r"2 images in [0-9.]+ s, [0-9.]+ images/s", plain[-2])


@pytest.mark.parametrize(
    ("answer", "begin", "end"),
    [
        ("\x1b_Gi=31;OK\x1b\\\x1b[?62;4c", "\x1b_Ga=T,f=100,q=2,c=32,m=0;iVBOR", "\x1b\\"),
        ("\x1bP>|iTerm2 3.5\x1b\\\x1b[?62;4c", "\x1b]1337;File=inline=1;size=", "\x07"),
        ("\x1b[?62;4;22c", '\x1bPq"1;1;256;256#0;2;', "\x1b\\"),
        ("\x1b[?1;2c", "▀", "▀"),
    ],
)
def test_the_picture_is_in_the_best_way_of_the_terminal(
    here: Path, answer: str, begin: str, end: str
) -> None:
    written = on_a_terminal(here, "generate", "a star", "--seed", "7", answer=answer)

    _, asked, after = written.partition(QUERY.decode())
    assert asked
    picture = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", after.split("\r\n1 image in")[0]).strip()
    assert picture.startswith(begin)
    assert picture.endswith(end)


def test_no_picture(here: Path) -> None:
    assert "▀" not in on_a_terminal(here, "generate", "a star", "--no-picture")


def test_sixels_show_the_pixels() -> None:
    picture = PIL.Image.new("RGB", (2, 2), (255, 0, 0))
    picture.putpixel((1, 0), (0, 0, 255))
    picture.putpixel((1, 1), (0, 0, 255))

    shown = sixels(_sixel(picture))

    assert shown.size == (256, 256)
    assert [shown.getpixel((x, y)) for x, y in ((0, 0), (0, 255), (255, 0), (255, 255))] == [
        (255, 0, 0),
        (255, 0, 0),
        (0, 0, 255),
        (0, 0, 255),
    ]


def sixels(text: str) -> PIL.Image.Image:
    """Decode a picture of sixels."""
    match = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)((?:#\d+;2;\d+;\d+;\d+)*)(.*)\x1b\\', text)
    assert match is not None
    picture = PIL.Image.new("RGB", (int(match[1]), int(match[2])))
    colours = {
        int(number): tuple(round(int(each) * 2.55) for each in values.split(";"))
        for number, values in re.findall(r"#(\d+);2;(\d+;\d+;\d+)", match[3])
    }
    for band, lines in enumerate(match[4].split("-")):
        for line in lines.split("$"):
            number, body = re.fullmatch(r"#(\d+)(.*)", line).groups()  # type: ignore[union-attr]
            runs = re.findall(r"(?:!(\d+))?([?-~])", body)
            row = "".join(character * int(count or 1) for count, character in runs)
            for x, character in enumerate(row):
                for bit in range(6):
                    if (ord(character) - 63) >> bit & 1:
                        picture.putpixel((x, 6 * band + bit), colours[int(number)])
    return picture


def test_a_terminal_shows_what_generate_waits_for(fake: FakeServer, here: Path) -> None:
    full = Overloaded("full", retry_after=0.5)
    loading = Unavailable("loading", reason="MODEL_LOADING", retry_after=0.5)
    fake.script(Behaviour(error=full), Behaviour(error=loading))

    written = on_a_terminal(here, "generate", "a star", "--seed", "7")

    assert "waits: the server's queue is full" in written
    assert "reconnecting (1): the model is loading" in written
    assert files(here) == ["a-star-7.png"]


def test_a_terminal_shows_the_unfinished_image(fake: FakeServer, here: Path) -> None:
    fake.script(default=Behaviour(step_seconds=0.15))

    written = on_a_terminal(here, "generate", "a star", "--preview")

    assert "▀" * 2 in re.sub(r"\x1b\[[0-9;]*m", "", written)


def test_a_preview_needs_a_terminal_and_pillow(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", "a star", "--preview"]) == 2
    assert "needs a terminal" in capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ValueError, match=r"pip install 'darkroom-client\[cli,pil\]'"):
        check_pillow()


def test_a_terminal_gets_whole_names(here: Path) -> None:
    written = on_a_terminal(here, "models")

    assert "resident" in written
    assert "…" not in written


def test_no_colour_in_a_pipe(capsys: Capture, here: Path) -> None:
    for command in (["generate", "a star"], ["models"], ["status"], ["estimate"]):
        assert main(command) == 0

    assert "\x1b" not in capsys.readouterr().out


def test_an_estimate(capsys: Capture, fake: FakeServer) -> None:
    fake.estimate = Estimate(
        queue_wait=1.5, run_time=2.0, peak_bytes=3 * 2**30, available_bytes=2**20
    )

    assert main(["estimate", "a star", "--steps", "30"]) == 0

    assert capsys.readouterr().out.splitlines() == [
        "queue\t1.50 s",
        "run\t2.00 s",
        "total\t3.50 s",
        "memory\t3.00 GiB",
        "available\t1.0 MiB",
    ]
    assert main(["estimate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_time"] == 2.0


def test_the_status(capsys: Capture, fake: FakeServer) -> None:
    assert main(["generate", "a star"]) == 0
    capsys.readouterr()

    assert main(["status"]) == 0
    rows = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert rows["state"] == "ready"
    assert rows["accepted"] == "1 (1 finished)"
    assert rows["engine 0"].startswith("fake, ready")
    (how_it_runs,) = (value for name, value in rows.items() if name.startswith("model "))
    assert "float32 contiguous, preset fast, eager denoiser; at most 8 rows (set)" in how_it_runs

    assert main(["status", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["runtime"]["vae_channels_last"] is False

    fake.state = ServerState.DRAINING
    assert main(["status", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["state"] == "draining"


@pytest.mark.parametrize(
    ("denoiser", "vae", "shown"),
    [
        (False, True, "float32 contiguous (VAE channels_last), preset"),
        (True, False, "float32 channels_last (VAE contiguous), preset"),
        (True, True, "float32 channels_last, preset"),
        (True, None, "float32 channels_last, preset"),
    ],
)
def test_the_status_has_the_layout_of_the_vae_if_it_is_another(
    denoiser: bool, vae: bool | None, shown: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fake_model()
    assert model.runtime is not None
    runtime = dataclasses.replace(model.runtime, channels_last=denoiser, vae_channels_last=vae)
    with FakeServer(models=[dataclasses.replace(model, runtime=runtime)]) as server:
        monkeypatch.setenv("DARKROOM_TARGET", server.target)
        assert main(["status"]) == 0
        with Client(server.target) as client:
            assert client.model(model.id).runtime == runtime
            record = client.generate("a star").image.replay
    assert shown in capsys.readouterr().out
    assert record.vae_channels_last == (None if vae == denoiser else vae)
    assert ReplayRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A large, yellow star!", "a-large-yellow-star"),
        ("Ein großer Stern über München", "ein-groer-stern-uber-munchen"),
        ("星", "image"),
        ("../../etc/passwd", "etc-passwd"),
        ("word " * 30, "-".join(["word"] * 12)),
        ("x" * 100, "x" * 60),
    ],
)
def test_slugs(prompt: str, name: str) -> None:
    assert slug(prompt) == name


def test_equal_names_get_a_number() -> None:
    paths = [Path("a-7.png"), Path("b-7.png"), Path("a-7.png"), Path("a-7.png")]

    assert [path.name for path in distinct(paths)] == [
        "a-7.png",
        "b-7.png",
        "a-7-2.png",
        "a-7-3.png",
    ]


def test_a_submitted_job_can_be_watched_and_cancelled(
    capsys: Capture, fake: FakeServer, here: Path
) -> None:
    held = Behaviour(hold=threading.Event())
    fake.script(Behaviour(), held)

    assert main(["submit", "a star", "--seed", "7", "--count", "2", "--time-limit", "60"]) == 0
    (request_id,) = capsys.readouterr().out.splitlines()
    assert main(["watch", request_id, "-o", "out", "--record"]) == 0

    assert capsys.readouterr().out.splitlines() == [
        f"{Path('out/a-star-7.png')}  seed 7  0.01 s",
        f"{Path('out/a-star-8.png')}  seed 8  0.01 s",
    ]
    assert files(here / "out") == [
        f"a-star-{seed}.{suffix}" for seed in (7, 8) for suffix in ("json", "png")
    ]
    assert main(["submit", "a circle", "--json", "--request-id", "mine"]) == 0
    assert json.loads(capsys.readouterr().out)["request_id"] == "mine"
    assert main(["cancel", "mine", request_id]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "mine  cancelled",
        f"{request_id}  had already ended",
    ]
    assert fake.jobs[1].state is JobState.CANCELLED
    assert main(["watch", "other"]) == 2


def test_the_same_request_id_joins_the_same_job(capsys: Capture, fake: FakeServer) -> None:
    for _ in range(2):
        assert main(["generate", "a star", "--request-id", "mine", "--overwrite"]) == 0

    assert [request.request_id for request in fake.requests] == ["mine"]
    assert main(["generate", "a star", "a circle", "--request-id", "mine"]) == 2
    assert "--request-id names one job" in capsys.readouterr().err


def test_top_fills_the_bars(fake: FakeServer, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineStatus(
        index=0,
        device="cuda:0",
        ready=True,
        restarts=1,
        jobs=2,
        samples=3,
        rows_in_use=6,
        memory_bytes={"device_used": 3 * 2**30, "device_total": 12 * 2**30, "allocated": 2**30},
        host_memory_bytes=0,
    )
    model = ModelStatus(
        id="demo",
        ready=True,
        queued_jobs=16,
        running_jobs=2,
        pass_times=(),
        max_rows=8,
        state=ModelState.RESIDENT,
    )
    status = ServerStatus(
        version="1",
        uptime=61.0,
        state=ServerState.READY,
        models=(model,),
        engines=(engine,),
        queued_jobs=16,
        max_queued_jobs=64,
        running_jobs=2,
        accepted_jobs=30,
        ended_jobs={"finished": 12, "failed": 0},
        host_memory_bytes=0,
    )

    assert [line.plain for line in _lines("here:1", status, 1.5)] == [
        "here:1  ready, up 0:01:01, version 1",
        f"queue     {'█' * 8}{'░' * 24} 16 of 64 jobs",
        f"batch 0   {'█' * 24}{'░' * 8} 6 of 8 rows  3 images, cuda:0, 1 restarts",
        f"memory 0  {'█' * 8}{'░' * 24} 3.00 GiB of 12.00 GiB  1.00 GiB by this engine",
        "jobs      2 running; 12 finished  1.50 finished per second",
        "demo      resident, 16 queued, 2 running",
    ]


def test_top_is_live_until_an_interrupt(capsys: Capture, fake: FakeServer, here: Path) -> None:
    assert main(["generate", "a star"]) == 0

    written = on_a_terminal(here, "top", "--interval", "0.1", interrupt_at="per second")

    assert "1 finished  0.00 finished per second" in written
    capsys.readouterr()
    assert main(["top"]) == 2
    assert "top needs a terminal" in capsys.readouterr().err


async def test_tls_trusts_the_roots_of_the_machine(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("darkroom.test")
    security = Security(tls_cert=str(cert), tls_key=str(key))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    named = (("grpc.ssl_target_name_override", "darkroom.test"),)
    async with serving(
        security=security,
        channel=lambda address: grpc.aio.secure_channel(address, credentials, named),
    ) as wire:
        monkeypatch.setenv("DARKROOM_TARGET", wire.server.address)

        command = ["models", "--timeout", "20", "--tls"]
        assert await asyncio.to_thread(main, [*command, "--server-name", "darkroom.test"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("demo\tresident")
        monkeypatch.delenv("SSL_CERT_FILE")
        assert await asyncio.to_thread(main, [*command, "--server-name", "darkroom.test"]) != 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generat", "a star"], "no command 'generat'; did you mean generate?"),
        (
            ["generate", "a", "--stpes", "3"],
            "unrecognized arguments: --stpes 3; did you mean --steps?",
        ),
        (["generate", "a", "--scheduler", "eulr"], "did you mean euler?"),
        (["generate", "a", "--format", "jpge"], "did you mean jpeg?"),
        (["generate", "a", "--model", "dmeo"], "this server holds demo; did you mean demo?"),
    ],
)
def test_a_wrong_name_suggests_the_right_one(
    capsys: Capture, arguments: list[str], words: str
) -> None:
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)

    assert code == 2
    assert words in capsys.readouterr().err


def test_errors_name_flags(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "--guidance 70 --size 9x8 --count 17 --negative " + "n" * 9000
    assert main(["generate", "a star", *wrong.split()]) == 2
    err = capsys.readouterr().err
    for words in (
        "--guidance: must be 0 to 50",
        "--size: must be a multiple of 8",
        "--count: must",
    ):
        assert words in err
    assert "--negative: must be at most" in err
    assert main(["models", "--insecure", "--tls"]) == 2
    assert main(["models", "--cert", "me.pem"]) == 2
    assert main(["models", "--target", "127.0.0.1:1", "--timeout", "0.5"]) == 3
    monkeypatch.setenv("DARKROOM_TOKEN", "secret")
    assert main(["models"]) == 2
    err = capsys.readouterr().err
    for flags in (
        "--insecure means no TLS",
        "--cert and --key",
        "(--target,",
        "pass --tls or --ca",
    ):
        assert flags in err
    assert not re.search(r"[A-Za-z]\(\.\.\.\)|TLS\(|insecure=|overwrite=", err)


def test_every_replaced_phrase_is_in_the_sdk() -> None:
    sources = Path(darkroom_client.__file__).parent.rglob("*.py")
    # Adjacent literals are one text.
    text = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in sources if "cli" not in path.parts
    )

    assert [phrase for phrase in PHRASES if phrase not in text] == []


def test_bash_completes_commands_flags_and_values(capsys: Capture) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def complete(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        program = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _darkroom\n"
        program += 'printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        return sorted(done.stdout.split())

    assert complete("darkroom", "wa") == ["wait", "watch"]
    assert complete("darkroom", "generate", "--st") == ["--steps", "--strength"]
    assert complete("darkroom", "generate", "--scheduler", "eu") == ["euler", "euler_ancestral"]
    assert complete("darkroom", "submit", "--prompt-s") == ["--prompt-syntax"]
    assert complete("darkroom", "submit", "--prompt-syntax", "") == ["plain", "weighted"]
    assert complete("darkroom", "cancel", "--st") == []


@pytest.mark.parametrize(
    "shell", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("zsh", "fish")]
)
def test_other_shells_accept_their_script(capsys: Capture, shell: str) -> None:
    assert main(["completion", shell]) == 0

    done = subprocess.run(
        [shell, "-n"], input=capsys.readouterr().out, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_jobs_are_listed_the_last_first(capsys: Capture, fake: FakeServer) -> None:
    fake.script(Behaviour(), Behaviour(queue=1, hold=threading.Event()))
    with Client(fake.target) as client:
        done, waits = [client.submit("a star", steps=4).request_id for _ in range(2)]
        client.result(done)
        fake.wait_for(lambda: fake.jobs[1].generation().queue_position == 1)

        assert main(["jobs"]) == 0
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [row[:6] for row in rows] == [
            [waits, "queued", "demo", "0 of 1", "0 of 4", "1"],
            [done, "finished", "demo", "1 of 1", "4 of 4", "-"],
        ]
        assert main(["jobs", "--limit", "1", "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert (json.loads(line)["request_id"], json.loads(line)["state"]) == (waits, "queued")
        assert main(["jobs", done]) == 0
        assert capsys.readouterr().out.startswith(f"{done}\tfinished")
        assert main(["jobs", "nobody"]) == 2
        assert "nobody" in capsys.readouterr().err
