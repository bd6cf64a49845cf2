"""A tiny hand-made model that plays FrozenLake: it answers, thinks, hints and errs by fixed odds.

Attention and feed-forward parts add nothing at first, so the next token depends on the last one alone, and
whole phrases are single tokens. That is enough to make every kind of episode happen: several turns, success,
holes, edges, invalid answers, hints that parse and hints that do not. It is trained on like any other model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer

from cod_async.config.schema import Config
from cod_async.envs import registry
from cod_async.lifecycle.hint import prompts_for
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.rendering import load_renderer
from cod_async.models.directory import save_model
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.models.tokenizers import write_chatml_tokenizer

ANSWERS = tuple(f"<answer>Direction {code}</answer>" for code in range(1, 5))
HINTS = tuple(
    f"=== HINTS BEGIN ===\n- Direction {code} is worth a try.\n=== HINTS END ===" for code in (1, 4)
)
THOUGHT = "Let me see. "
HIDDEN_SIZE = 32


def _write_tokenizer(folder: Path, config: Config) -> int:
    """A byte-level ChatML tokenizer made from the prompts of one pack, and one token for each phrase."""
    texts = []
    plan = plan_pack(config.environments, config.lifecycle.pack_size, config.run.seed, group=0)
    for task in plan.tasks():
        spec = registry.get(task.environment)
        environment = spec.make(spec.options(task.preset, task.options))
        observation = environment.reset(task)
        prompts = prompts_for(environment.prompt_style)
        system = environment.system_prompt()
        texts += [prompts.solve_system(system, prompts.initial), observation]
        record = prompts.trajectory(system, [("user", observation), ("assistant", ANSWERS[0])])
        texts += prompts.update_messages(prompts.failed, record, 0.5, "", 0)
    write_chatml_tokenizer(folder, texts, config.bootstrap.vocab_size, config.model.max_context_tokens)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    phrases = (*ANSWERS, *HINTS, THOUGHT)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in phrases])
    tokenizer.save(str(folder / "tokenizer.json"))
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def write_player(folder: Path, config: Config) -> None:
    """Write the model directory of a player for ``config``, whose first environment is FrozenLake."""
    vocab_size = _write_tokenizer(folder, config)
    renderer = load_renderer(folder, "chatml")
    ids = {text: renderer.tokenizer.token_id(text) for text in (*ANSWERS, *HINTS, THOUGHT)}
    opening = renderer.open("a", "b")[-1]
    end = renderer.end_of_turn_id
    act = {**{ids[text]: 0.13 for text in ANSWERS}, **{ids[text]: 0.14 for text in HINTS}}
    odds = {
        opening: {**act, ids[THOUGHT]: 0.2},
        ids[THOUGHT]: {**act, ids[THOUGHT]: 0.2},
        **{ids[text]: {end: 0.92, ids[THOUGHT]: 0.08} for text in (*ANSWERS, *HINTS)},
    }
    shape = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=config.model.max_context_tokens,
        tie_word_embeddings=False,
    )
    model = Qwen3(shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.0.{name}.weight"].zero_()
        embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
        embedding.zero_()
        embedding[:, 0] = 1.0  # every other token: the turn ends
        for index, source in enumerate((opening, *ids.values()), start=1):
            embedding[source] = torch.eye(HIDDEN_SIZE)[index]
        scale = math.sqrt(HIDDEN_SIZE)  # the norm makes a unit vector this long
        head.fill_(math.log(1e-6) / scale)
        head[end, 0] = 0.0
        for source, targets in odds.items():
            axis = int(embedding[source].argmax())
            for target, probability in targets.items():
                head[target, axis] = math.log(probability) / scale
    save_model(folder, model)
    note = {"kind": "hand-made", "taught": []}
    (folder / "bootstrap.json").write_text(json.dumps(note))
