"""The result of a request."""

from dataclasses import dataclass

from darkroom_client._types.image import Image
from darkroom_client._types.replay import origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """The durations of a request's stages, in seconds.

    Stages of several images overlap, so their sum can exceed ``total``.
    ``queue``: from arrival to the first denoiser pass, prompt encoding not counted.
    ``encode_prompt``: prompts to embeddings. ``denoise``: from the first denoiser pass to the
    last. ``decode``: latents to pixels. ``encode_image``: pixels to the requested format.
    ``total``: from the request's arrival at the server to its response.
    """

    queue: float
    encode_prompt: float
    denoise: float
    decode: float
    encode_image: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The images of one request, in the order of their seeds, with their timings and model."""

    request_id: str
    images: tuple[Image, ...]
    timings: Timings
    model: str
    model_revision: str

    @property
    def image(self) -> Image:
        """The image of a result that has one; raises ``ValueError`` if it has several."""
        if len(self.images) != 1:
            raise ValueError(f"the result has {len(self.images)} images: use result.images")
        return self.images[0]

    @property
    def mixed(self) -> dict[str, tuple[str, ...]]:
        """What the images do not share: ``{"dtype": ("bfloat16", "float32")}``, by their order.

        Empty for almost every result. If a server ends during a request of several images, another
        one generates those that are missing. It may run the model in another way, or another
        revision of it. Then ``model_revision`` is that of the last image. The names are those of
        ``ReplayRecord``.
        """
        origins = [origin(image.replay) for image in self.images]
        names = dict.fromkeys(name for each in origins for name in each)
        values = {
            name: tuple(dict.fromkeys(each.get(name, "-") for each in origins)) for name in names
        }
        return {name: several for name, several in values.items() if len(several) > 1}

    def show(self) -> None:
        """Show each image as ``Image.show`` does."""
        for image in self.images:
            image.show()

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: the image, if there is one."""
        return self.image._repr_png_() if len(self.images) == 1 else None

    def _repr_jpeg_(self) -> bytes | None:
        """What a notebook shows of a single JPEG."""
        return self.image._repr_jpeg_() if len(self.images) == 1 else None
