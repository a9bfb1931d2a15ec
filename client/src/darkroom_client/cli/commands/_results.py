"""The images of a job: as files, and as lines of output."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from darkroom_client._errors import DarkroomError
from darkroom_client._files import write_atomically
from darkroom_client._protocol.mixed_images import mixed_text
from darkroom_client._types.image import Image
from darkroom_client._types.result import GenerationResult
from darkroom_client.cli.terminal._display import Display


def save(path: Path, image: Image, arguments: argparse.Namespace) -> None:
    """Write the image, and its record if asked for; raises ``ImageWithheld``."""
    image.save(path, overwrite=arguments.overwrite)
    if arguments.record:
        record = image.replay.to_json().encode()
        write_atomically(path.with_suffix(".json"), record, overwrite=arguments.overwrite)


def report(
    paths: tuple[Path, ...],
    result: GenerationResult,
    arguments: argparse.Namespace,
    display: Display,
) -> None:
    """Print a line for each image that was saved."""
    for path, image in zip(paths, result.images, strict=True):
        if image.flagged:
            continue
        if arguments.json:
            print_json(_image_json(path, image, result))
            continue
        cut = "  (the prompt's end was ignored: it is too long)" if image.prompt_truncated else ""
        seconds = _seconds(result, verbose=arguments.verbose)
        display.print(str(path), f"  seed {image.seed}  {seconds} s{cut}")
        display.count(image)
    if result.mixed:
        print(
            f"darkroom: the images of request {result.request_id} were not all "
            f"generated in the same way: {mixed_text(result.mixed)}",
            file=sys.stderr,
        )


def error_json(error: DarkroomError) -> dict[str, object]:
    """``error`` as JSON values."""
    return {
        "message": str(error),
        "kind": type(error).__name__,
        "code": error.code,
        "reason": error.reason,
        "request_id": error.request_id,
        "retry_after": error.retry_after,
    }


def print_json(value: object) -> None:
    """Print one line."""
    # Flush, so the next program in a pipe can begin with the first image.
    print(json.dumps(value), flush=True)


def _seconds(result: GenerationResult, *, verbose: bool) -> str:
    if not verbose:
        return f"{result.timings.total:.2f}"
    stages = dataclasses.asdict(result.timings)
    return "  ".join(f"{stage} {value:.3f}" for stage, value in stages.items())


def _image_json(path: Path, image: Image, result: GenerationResult) -> dict[str, object]:
    return {
        "path": str(path),
        "prompt": image.replay.request.prompt,
        "seed": image.seed,
        "width": image.width,
        "height": image.height,
        "prompt_truncated": image.prompt_truncated,
        "pixels_sha256": image.replay.pixels_sha256,
        "request_id": result.request_id,
        "model": result.model,
        "model_revision": result.model_revision,
        "mixed": result.mixed,
        "seconds": dataclasses.asdict(result.timings),
    }
