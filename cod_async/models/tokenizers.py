"""Small tokenizers made on the spot, as ordinary Hugging Face files with a chat template.

A model that starts from nothing needs a vocabulary that fits it: one id per word for the terse quickstart
model, and a byte-level one with ChatML control tokens for tiny models that talk like their big relatives.
Both are written as ``tokenizer.json`` and ``tokenizer_config.json``, so that transformers, serving stacks and
our own renderers read the same files. No torch is loaded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cod_async.durable import write_atomic
from cod_async.errors import InputError

TERSE_SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eot>", "<user>", "<asst>")
"""Control tokens of the terse family, ids 0 to 5 in this order."""

CHATML_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Control tokens of the small ChatML family, ids 0 to 2 in this order."""

MIN_CHATML_VOCAB = 300
"""Smallest byte-level vocabulary: 256 bytes, five added tokens, and a few merges."""

# The system text runs straight into the first user message; every token counts at this size.
TERSE_TEMPLATE = (
    "{{- '<bos>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- ' <asst> ' + message['content'] + ' <eot>' -}}"
    "{%- elif loop.previtem is defined and loop.previtem['role'] == 'assistant' -%}"
    "{{- ' <user> ' + message['content'] -}}"
    "{%- else -%}{{- ' ' + message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' <asst>' -}}{%- endif -%}"
)

# ChatML with the thinking switch: off puts an empty think block before the response.
CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}"
    "{%- endif -%}"
    "{%- endif -%}"
)


def _save(model_dir: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> int:
    """Write both files and return the vocabulary size."""
    model_dir.mkdir(parents=True, exist_ok=True)
    common = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_atomic(model_dir / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    settings = json.dumps(common | config, indent=2) + "\n"
    write_atomic(model_dir / "tokenizer_config.json", settings.encode())
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def write_word_tokenizer(model_dir: Path, words: Sequence[str], max_context_tokens: int) -> int:
    """Write a tokenizer with one id per whitespace-separated word, terse family.

    Args:
        model_dir: folder to write into; made if missing.
        words: the vocabulary after the control tokens, in id order; repeated words count once.
        max_context_tokens: longest row, noted for transformers.

    Returns:
        The vocabulary size, control tokens included.

    Raises:
        InputError: a word is empty, contains white space, or is a control token.
    """
    wrong = [
        word
        for word in words
        if len(word.split()) != 1 or word.split() != [word] or word in TERSE_SPECIAL_TOKENS
    ]
    if wrong:
        raise InputError(
            f"these cannot be words of a vocabulary: {wrong}; words have no white space and no control names"
        )
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((*TERSE_SPECIAL_TOKENS, *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - the name of a token
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in TERSE_SPECIAL_TOKENS]
    )
    config = {
        "bos_token": "<bos>",
        "eos_token": "<eot>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": max_context_tokens,
        "chat_template": TERSE_TEMPLATE,
    }
    return _save(model_dir, tokenizer, config)


def write_chatml_tokenizer(
    model_dir: Path, texts: Iterable[str], vocab_size: int, max_context_tokens: int
) -> int:
    """Write a small byte-level BPE tokenizer with ChatML control tokens, its merges learned from ``texts``.

    Args:
        model_dir: folder to write into; made if missing.
        texts: what the model will read (prompts, observations); any other text still encodes, byte by byte.
        vocab_size: most ids, at least :data:`MIN_CHATML_VOCAB`; fewer if the texts have too little to merge.
        max_context_tokens: longest row, noted for transformers.

    Returns:
        The vocabulary size, control tokens included.

    Raises:
        InputError: ``vocab_size`` is too small to hold all bytes.
    """
    if vocab_size < MIN_CHATML_VOCAB:
        raise InputError(
            f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least {MIN_CHATML_VOCAB}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    think = [AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(think),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CHATML_SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(texts), trainer)
    tokenizer.add_tokens(think)
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": max_context_tokens,
        "chat_template": CHATML_TEMPLATE,
    }
    return _save(model_dir, tokenizer, config)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield the non-empty texts; training on none at all is fine and learns no merges."""
    return (text for text in texts if text)
