"""Qwen-Image-Edit: Qwen-Image with reference images, which its text encoder reads as well."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers.processing_utils import ProcessorMixin

from darkroom_server.core.errors import StartupError
from darkroom_server.core.job import Job, Task
from darkroom_server.engine.families.qwen_image import QwenImage
from darkroom_server.engine.loading.vocabulary import has_vocabulary

PROCESSOR = "processor"


class ImageProcessor(transformers.Qwen2VLProcessor):  # type: ignore[misc]
    """The processor of the model's folder, for prompts with images.

    That of transformers reads videos as well, and cannot be made without torchvision.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        # Past the constructor of transformers' class, which asks for a reader of videos.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class QwenImageEdit(QwenImage):
    """The family of ``QwenImageEditPipeline``, which edits one image."""

    pipeline_class = "QwenImageEditPipeline"
    own_task = Task.EDIT
    tasks: ClassVar[Mapping[Task, str]] = {}

    @classmethod
    def check_folder(cls, folder: Path, name: str) -> None:
        """Check the tokenizers, as other families, and that of the processor.

        Raises ``StartupError``.
        """
        super().check_folder(folder, name)
        if not has_vocabulary(folder / PROCESSOR):
            raise StartupError(
                f"model {name!r} has no vocabulary in its {PROCESSOR}; copy or download it again"
            )

    @classmethod
    def weightless_parts(cls, folder: Path) -> dict[str, Any]:
        """The processor."""
        return {PROCESSOR: ImageProcessor.from_pretrained(folder / PROCESSOR)}

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of ``core.model.OPTIONAL_FIELDS`` that the model takes."""
        return super().optional_fields - {"max_sequence_length"}

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt that the model was made for; its pipeline cuts none."""
        return int(self.pipeline.tokenizer_max_length)

    def is_truncated(self, job: Job) -> bool:
        """Never: the pipeline reads each prompt to its end."""
        return False


class QwenImageEditPlus(QwenImageEdit):
    """The family of ``QwenImageEditPlusPipeline``, which reads several images."""

    pipeline_class = "QwenImageEditPlusPipeline"
    # Its card says that one to three work best.
    most_reference_images = 3
