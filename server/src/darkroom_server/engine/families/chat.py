"""Prompts that a pipeline puts into the chat template of its tokenizer."""

from typing import Any


def chat_length(tokenizer: Any, prompt: str, *, enable_thinking: bool) -> int:
    """Tokens of ``prompt`` as the message of a user, with the start of an answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )
    return len(tokenizer(text, verbose=False).input_ids)
