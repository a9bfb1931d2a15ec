"""What `make demo` runs: start a server, generate images, show the timings, stop it."""

import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import IO

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from rich.console import Console
from rich.table import Table

from darkroom_client import Client, Control, DarkroomError, GenerationRequest, Timings, Unavailable

TEXT = GenerationRequest("a small red circle on the left on a white background")
SEED = 7
OUTPUT = Path("demo-output")
STAGES = [field.name for field in dataclasses.fields(Timings)]
METRICS = (
    "darkroom_request_seconds_count",
    "darkroom_images_total",
    "darkroom_gpu_memory_bytes",
    "darkroom_host_memory_bytes",
)
READY_SECONDS = 600
GENERATE_SECONDS = 600  # Generous, for a busy machine.
STOP_SECONDS = 60
LOG_LINES = 20

RESAMPLING = PIL.Image.Resampling

console = Console(highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    """Run the demo; returns the exit code."""
    port, metrics_port = free_ports()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        server = start_server(port, metrics_port, log)
        try:
            with Client(f"127.0.0.1:{port}", insecure=True, timeout=GENERATE_SECONDS) as client:
                failure = wait_until_ready(client, server) or generate(client)
            if not failure:
                show_metrics(metrics_port)
        finally:
            code = stop_server(server)
        if failure is None and code != 0:
            failure = f"the server ended with {code}"
        if failure is not None:
            console.print(f"{failure}; the end of the server's log:", style="bold red")
            log.seek(0)
            console.print("".join(log.readlines()[-LOG_LINES:]))
            return 1
    console.print("the server stopped cleanly")
    return 0


def free_ports() -> tuple[int, int]:
    """Return two ports that are free at this moment."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def start_server(port: int, metrics_port: int, log: IO[str]) -> "subprocess.Popen[bytes]":
    """Start `darkroom-server serve` with the demo model; its output goes to ``log``."""
    flags = ["serve", "--port", str(port), "--metrics-port", str(metrics_port)]
    console.print(f"darkroom-server {' '.join(flags)}", style="bold")
    # In its own session: Ctrl-C then reaches only this program, which stops the server.
    return subprocess.Popen(
        [sys.executable, "-m", "darkroom_server", *flags],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def wait_until_ready(client: Client, server: "subprocess.Popen[bytes]") -> str | None:
    """Wait until the server is ready; return None, or a message if it fails."""
    with console.status("loading the model"):
        for _ in range(READY_SECONDS):
            # One second at a time, to notice a server that dies.
            with contextlib.suppress(Unavailable):
                client.wait_until_ready(timeout=1)
                break
            if server.poll() is not None:
                return f"the server ended with {server.returncode}"
        else:
            return f"the server was not ready after {READY_SECONDS} s"
    model = client.model()
    if model.runtime is not None:
        console.print(f"ready: {model.id} on {model.runtime.device} in {model.runtime.dtype}")
    return None


def generate(client: Client) -> str | None:
    """Generate all images, and show the timings; return None, or an error message."""
    OUTPUT.mkdir(exist_ok=True)
    try:
        with console.status("generating an image from text"):
            first = client.generate(TEXT, seed=SEED, format="png")
        image = first.image.to_pil()
        more = from_image(image) | with_adapters(image)
        with console.status(f"generating {len(more)} images in the same batches"):
            others = client.generate_many(
                more.values(), concurrency=len(more), seed=SEED, format="png"
            )
    except DarkroomError as error:
        return str(error)
    table = Table("image", *(f"{stage} s" for stage in STAGES), box=None)
    pictures = {}
    requests = {"text": TEXT} | more
    for (name, request), answer in zip(requests.items(), [first, *others], strict=True):
        if isinstance(answer, DarkroomError):
            return f"{name}: {answer}"
        path = answer.image.save(OUTPUT / f"{name.replace(' ', '-')}.png", overwrite=True)
        pictures[name] = framed(answer.image.to_pil(), name, request)
        seconds = [f"{getattr(answer.timings, stage):.3f}" for stage in STAGES]
        table.add_row(str(path), *seconds)
        if not console.is_terminal:
            console.print(f"{path}  seconds: {named(seconds)}")
    if console.is_terminal:
        console.print(table, soft_wrap=False)
    console.print(f"all of them: {save_contact_sheet(list(pictures.values()))}", style="bold green")
    return None


def from_image(image: PIL.Image.Image) -> dict[str, GenerationRequest]:
    """Return requests that start from ``image``."""
    width, height = image.size
    right_half = PIL.Image.new("L", image.size)
    right_half.paste(255, (width // 2, height // 4, width, height * 3 // 4))
    return {
        "image to image": GenerationRequest(
            "a small green star on the left on a white background", image=image, strength=0.6
        ),
        "inpaint": GenerationRequest(
            "a small blue square on the right on a white background",
            image=image,
            mask_image=right_half,
            strength=1.0,
        ),
    }


def with_adapters(image: PIL.Image.Image) -> dict[str, GenerationRequest]:
    """Return requests with adapters of the demo model, for images of the size of ``image``."""
    prompt = "a large yellow star on a blue background"
    return {
        "LoRA": GenerationRequest(prompt, loras={"outline": 1.0}),
        "two LoRAs": GenerationRequest(prompt, loras={"outline": 1.0, "night": 1.0}),
        "ControlNet": GenerationRequest(
            "a red circle on a yellow background", controls=[Control("position", disc(image.size))]
        ),
    }


def named(seconds: list[str]) -> str:
    """Return each number after the name of its stage."""
    return "  ".join(f"{stage} {figure}" for stage, figure in zip(STAGES, seconds, strict=True))


def disc(size: tuple[int, int]) -> PIL.Image.Image:
    """Return a control image: white where the shape shall be, near the lower right corner."""
    width, height = size
    image = PIL.Image.new("RGB", size)
    box = (width * 0.5, height * 0.45, width * 0.95, height * 0.9)
    PIL.ImageDraw.Draw(image).ellipse(box, "white")
    return image


def framed(picture: PIL.Image.Image, name: str, request: GenerationRequest) -> PIL.Image.Image:
    """Return the picture, 256 pixels wide, with its mask or control image, and with captions."""
    scale = max(1, 256 // picture.width)
    large = picture.resize((picture.width * scale, picture.height * scale), RESAMPLING.NEAREST)
    for given in (request.mask_image, *(control.image for control in request.controls)):
        if isinstance(given, PIL.Image.Image):
            large.paste(given.resize((64, 64)), (large.width - 68, 4))
    frame = PIL.Image.new("RGB", (large.width, large.height + 34), "white")
    frame.paste(large)
    text = PIL.ImageDraw.Draw(frame)
    text.text((0, large.height + 3), name, "black", PIL.ImageFont.load_default(14))
    words = ", ".join((request.prompt, *(request.loras or ())))
    text.text((0, large.height + 20), words, "gray", PIL.ImageFont.load_default(10))
    return frame


def save_contact_sheet(pictures: list[PIL.Image.Image], columns: int = 3, gap: int = 8) -> Path:
    """Save all pictures on one sheet; they are of one size."""
    width, height = (length + gap for length in pictures[0].size)
    rows = -(-len(pictures) // columns)
    sheet = PIL.Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (gap + column * width, gap + row * height))
    path = OUTPUT / "contact-sheet.png"
    sheet.save(path)
    return path


def show_metrics(port: int) -> None:
    """Print a few of the lines that Prometheus would scrape."""
    url = f"http://127.0.0.1:{port}/metrics"
    # No proxy: it cannot reach this machine's loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    console.print(f"from {url}:", style="bold")
    for line in lines:
        if line.startswith(METRICS):
            console.print(f"  {line}")


def stop_server(server: "subprocess.Popen[bytes]") -> int:
    """Stop the server with SIGTERM, as an orchestrator does, and return its exit code."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        return server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def end(number: int, frame: object) -> None:
    """Exit as after Ctrl-C, so the server is stopped too."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
