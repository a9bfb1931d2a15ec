"""Settings of the images that callers send."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from darkroom_server.settings.option import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """The images that requests start from: uploads, and what decodes them."""

    upload_bytes: Annotated[
        int,
        Ge(0),
        Setting(
            "Total size of the uploaded files that are kept. When full, evict the least recently "
            "used one of the caller using the most.",
            choose="The memory that the machine can spare. A client uploads an evicted file again.",
            metavar="BYTES",
        ),
    ] = 256 * 1024**2
    upload_bytes_per_caller: Annotated[
        int,
        Ge(0),
        Setting(
            "The share of `--upload-bytes` that one caller may use, and the largest file.",
            choose="Several times the images that one request brings.",
            metavar="BYTES",
        ),
    ] = 64 * 1024**2
    upload_ttl: Annotated[
        float,
        Gt(0),
        Setting(
            "Seconds that an uploaded file is kept after its last use.",
            choose="As long as a user works with the same picture.",
            metavar="SECONDS",
        ),
    ] = 3600.0
    input_bytes: Annotated[
        int,
        Ge(0),
        Setting(
            "Total size of the decoded images that accepted jobs hold until they end; further jobs "
            "with images are rejected.",
            choose="An image of 1024×1024 pixels takes 3 MiB.",
            metavar="BYTES",
        ),
    ] = 1024**3
    input_bytes_per_caller: Annotated[
        int,
        Ge(0),
        Setting(
            "The share of `--input-bytes` that the files of one caller may take in a `--ledger` "
            "other than memory; further jobs of the caller with images are rejected.",
            choose="The images that a caller may have waiting, as files. A file that several jobs "
            "share counts once.",
            metavar="BYTES",
        ),
    ] = 256 * 1024**2
    max_reference_images: Annotated[
        int,
        Ge(1),
        Setting(
            "Most reference images of one edit, for models that take several.",
            choose="Each makes an edit slower and takes memory, as one more image does.",
            metavar="N",
        ),
    ] = 4
    image_workers: Annotated[
        int,
        Ge(1),
        Setting(
            "Processes that decode images; they start with the first image.",
            choose="One less than that decodes for the same caller at once.",
            metavar="N",
        ),
    ] = 2
    image_megapixels: Annotated[
        float,
        Gt(0),
        Setting(
            "Most millions of pixels of an image; a larger one is rejected before it is decoded.",
            choose="An image worker may take 22 bytes for each pixel.",
            metavar="N",
        ),
    ] = 64.0
    image_timeout: Annotated[
        float,
        Gt(0),
        Setting(
            "Seconds that decoding one image may take; then it is rejected.",
            choose="Several times what the largest image takes on this machine.",
            metavar="SECONDS",
        ),
    ] = 30.0
