"""Tokenizers of real classes, trained on the words of the demo model."""

import json
from typing import Any

import tokenizers
import transformers

from training.prompts import WORDS

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>")


def bpe(kind: Any = transformers.PreTrainedTokenizerFast, **settings: Any) -> Any:
    """A byte-pair tokenizer of class ``kind``; ``settings`` are of its class."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=[chr(code) for code in range(0x21, 0x7F)],
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    trained.train_from_iterator([" ".join(WORDS)], trainer)
    common = {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        **settings,
    }
    if kind is transformers.PreTrainedTokenizerFast:
        trained.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
        )
        return kind(tokenizer_object=trained, **common)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return kind(vocab=model["vocab"], merges=merges, **common)
