"""Which models are trained, judged from ``config.json`` alone, so that a plan can refuse one without weights.

Three questions: does the learner train it at all (:func:`unsupported`), can the plain-torch
:class:`cod_async.models.qwen3.Qwen3` compute it, which is what the embedded engine needs
(:func:`not_plain_qwen3`), and does it carry a state from token to token (:func:`is_recurrent`). Everything
else that transformers knows as a causal language model is taken; strict loading has the last word. Loads no
torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NATIVE_ARCHITECTURE = "Qwen3ForCausalLM"
"""The architecture that is written out in plain torch."""
RECURRENT_TYPES = ("qwen3_5", "qwen3_5_text", "qwen3_next")
"""Model types with gated delta layers that are known to keep right-padded rows apart."""
_HEADS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_LAYER_TYPES = ("full_attention", "linear_attention")
_ROW_DEPENDENT_ROPE = ("dynamic", "longrope")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_DROPOUT = re.compile(r"(dropout|pdrop|layerdrop|dropout_prob|dropout_rate)$")
_UNUSED_DROPOUT = ("classifier_dropout", "summary_first_dropout")
_LOGIT_CHANGE = re.compile(r"(logit|lm_head).*(scal|cap|multiplier)")


def text_values(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a ``config.json`` that describes the language model."""
    nested = raw.get("text_config")
    return nested if isinstance(nested, dict) else raw


def is_recurrent(raw: Mapping[str, Any]) -> bool:
    """Whether some layers carry a state from token to token; such a model takes rectangles only."""
    return raw.get("model_type") in RECURRENT_TYPES or "linear_attention" in _layer_types(text_values(raw))


def unsupported(raw: Mapping[str, Any]) -> list[str]:
    """List what this version does not train, each with the option and its value.

    Args:
        raw: a ``config.json``, or what transformers makes of it (``config.to_dict()``), where options that
            the file leaves out have their defaults.

    Returns:
        One sentence per problem; empty if nothing speaks against the model.
    """
    values = text_values(raw)
    problems = [*_whole_model(raw, values), *_layers(values)]
    for name, value in values.items():
        if not _is_number(value) or isinstance(value, bool):
            continue
        if _DROPOUT.search(name) and name not in _UNUSED_DROPOUT and value > 0:
            problems.append(f"{name} {value} would make log-probs random; set it to 0")
        elif _LOGIT_CHANGE.search(name) and value != 1:
            problems.append(
                f"{name} {value}: logits must be the head's product with the hidden states, unscaled and "
                "uncapped"
            )
    return problems


def _whole_model(raw: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    problems = []
    if raw.get("auto_map"):
        problems.append("auto_map asks for code from the model directory, which is never run")
    if raw.get("quantization_config") or values.get("quantization_config"):
        problems.append("quantized weights cannot be trained; give the model in bfloat16 or float32")
    if raw.get("is_encoder_decoder") or values.get("is_encoder_decoder"):
        problems.append("encoder-decoder models are not causal language models")
    experts = {name: values[name] for name in _EXPERTS if _is_number(values.get(name)) and values[name] > 0}
    if experts or "moe" in str(raw.get("model_type")):
        found = ", ".join(f"{name} {value}" for name, value in experts.items()) or raw.get("model_type")
        problems.append(f"mixture of experts ({found}): router replay does not exist yet")
    architectures = raw.get("architectures")
    if isinstance(architectures, list | tuple) and architectures:
        others = [str(name) for name in architectures if not str(name).endswith(_HEADS)]
        if others:
            problems.append(f"architecture {', '.join(others)} is no causal language model")
    outer, inner = raw.get("tie_word_embeddings"), values.get("tie_word_embeddings")
    if isinstance(outer, bool) and isinstance(inner, bool) and outer != inner:
        problems.append(f"tie_word_embeddings is {outer}, but {inner} in text_config; make them agree")
    return problems


def _layers(values: Mapping[str, Any]) -> list[str]:
    problems = []
    kinds = _layer_types(values)
    others = sorted(kinds.difference(_LAYER_TYPES))
    if others:
        problems.append(f"layer_types {', '.join(others)}: only {' and '.join(_LAYER_TYPES)} are implemented")
    if not kinds and values.get("sliding_window") and values.get("use_sliding_window", True):
        problems.append(f"sliding_window {values['sliding_window']}: attention has no window here")
    elif "sliding_attention" not in kinds and values.get("use_sliding_window"):
        problems.append("use_sliding_window true: attention has no window here")
    if values.get("alibi"):
        problems.append("alibi true: attention takes no position bias here")
    if values.get("use_bidirectional_attention") or values.get("is_causal") is False:
        problems.append("attention must be causal")
    for rope in _ropes(values):
        if rope in _ROW_DEPENDENT_ROPE:
            problems.append(
                f"rotary type {rope!r} changes a row with the longest row beside it; use a fixed one "
                "(default, linear, yarn, llama3)"
            )
    return problems


def not_plain_qwen3(raw: Mapping[str, Any]) -> list[str]:
    """List why the plain-torch Qwen3 cannot compute a model; empty if it can."""
    architectures = raw.get("architectures") or []
    if architectures != [NATIVE_ARCHITECTURE]:
        listed = ", ".join(map(str, architectures)) if isinstance(architectures, list) else str(architectures)
        found = listed or f"model_type {raw.get('model_type')!r}, no architectures"
        return [f"architecture {found} is not supported; this project loads {NATIVE_ARCHITECTURE}"]
    problems = []
    if raw.get("attention_bias"):
        problems.append("attention_bias true is not supported")
    if raw.get("use_sliding_window"):
        problems.append("use_sliding_window true is not supported")
    others = sorted(_layer_types(raw).difference(["full_attention"]))
    if others:
        problems.append(f"layer_types {', '.join(others)}: only full_attention is supported")
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} is not supported; only 'silu' is")
    problems += [
        f"rotary type {kind!r} is not supported; only 'default' is"
        for kind in _ropes(raw)
        if kind != "default"
    ]
    if raw.get("quantization_config"):
        problems.append("quantized weights are not supported")
    return problems


def _layer_types(values: Mapping[str, Any]) -> set[str]:
    kinds = values.get("layer_types")
    return {str(kind) for kind in kinds} if isinstance(kinds, list | tuple) else set()


def _ropes(values: Mapping[str, Any]) -> list[str]:
    """Return the rotary types that are named, in the current spelling and in the older ones."""
    found = []
    for field in ("rope_parameters", "rope_scaling"):
        rope = values.get(field)
        if isinstance(rope, dict):
            found.append(rope.get("rope_type", rope.get("type", "default")))
    return [str(kind) for kind in dict.fromkeys(map(str, found))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
