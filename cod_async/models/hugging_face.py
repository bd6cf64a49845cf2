"""Any causal language model of transformers as a :class:`cod_async.models.policy.Policy`.

The class that ``config.json`` names is built without weights (on torch's meta device) and its parts are taken
over under their own names, so parameter names are those of the model directory. Attention is
:func:`cod_async.models.attention.attend`, through transformers' table of attention functions; the layout of
the rows reaches it as a keyword argument through the layers. The head is not run: whoever needs log-probs
multiplies with :attr:`~cod_async.models.policy.Policy.head_weight`, and models for which that is not the
whole story are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cod_async.errors import InputError
from cod_async.models.attention.transformers import ATTENTION_NAME, LAYOUT, register
from cod_async.models.layout import RECTANGLE, Layout
from cod_async.models.policy import Policy
from cod_async.models.stored import CONFIG_FILE, read_json
from cod_async.models.supported import RECURRENT_TYPES, unsupported


class HuggingFacePolicy(Policy):
    """A causal language model of transformers up to its last hidden states.

    Made by :func:`build_policy`; parameters are on the meta device until they are loaded.

    Args:
        model: the causal language model without weights; its parts become this module's, and it must not be
            used afterwards.
        config: transformers' configuration of the language model.
        is_recurrent: whether some layers carry a state from token to token.

    Attributes:
        config: as given.
        has_vision: the model directory also holds a vision tower, and names the backbone accordingly.
    """

    has_vision: bool = False

    def __init__(self, model: Any, config: Any, *, is_recurrent: bool) -> None:
        super().__init__()
        self.config = config
        self.is_recurrent = is_recurrent
        for name, part in model.named_children():
            self.add_module(name, part)
        names = {id(part): name for name, part in self.named_modules()}
        self._backbone_name: str = model.base_model_prefix
        self._head_name = names[id(model.get_output_embeddings())]
        self._embedding_name = names[id(model.get_input_embeddings())]
        self._blocks_name = names[id(_blocks_of(model.base_model, config))]
        # The gradient of a padding id's embedding would be dropped; padding has no weight in the loss anyway.
        embedding = self.get_submodule(self._embedding_name)
        if isinstance(embedding, nn.Embedding):
            embedding.padding_idx = None
        self._tables = _remake_tables(model, self)
        self.eval()

    @property
    def backbone(self) -> nn.Module:
        """What ends at the last hidden states."""
        return self.get_submodule(self._backbone_name)

    @property
    def head_name(self) -> str:
        """Name of the head's parameter."""
        return f"{self._head_name}.weight"

    @property
    def embedding_name(self) -> str:
        """Name of the embedding's parameter."""
        return f"{self._embedding_name}.weight"

    @property
    def head_weight(self) -> Tensor:
        """The output head, [vocab_size, hidden_size]: ``logits = hidden @ head_weight.T``."""
        return self.get_parameter(self.head_name)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, in order."""
        return list(self.get_submodule(self._blocks_name).children())

    def forward(self, input_ids: Tensor, layout: Layout = RECTANGLE) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            input_ids: int64 [B, T]; in a rectangle short rows are padded on the right with any valid id.
            layout: how rows lie.

        Returns:
            [B, T, hidden_size]; what stands at padded positions is meaningless.

        Raises:
            ValueError: a layout that is no rectangle for a model with recurrent layers.
        """
        if self.is_recurrent and layout.kind != "rectangle":
            raise ValueError(f"recurrent layers take rectangles only, not the layout {layout.kind!r}")
        states = self.backbone(
            input_ids=input_ids, position_ids=layout.position_ids, use_cache=False, **{LAYOUT: layout}
        )
        hidden: Tensor = states.last_hidden_state
        return hidden

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HuggingFacePolicy:
        """Move and convert as always, but keep the rotary tables as they were computed.

        A table that was rounded to bfloat16, or left empty by ``to_empty``, would turn far positions by wrong
        angles without any sign.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in self._tables.items():
            owner, leaf = _owner(self, name)
            device = self.head_weight.device
            owner._buffers[leaf] = table.to(device)
        return self


def build_policy(folder: Path) -> HuggingFacePolicy:
    """Build a policy without weights from ``folder/config.json``.

    Raises:
        InputError: the model is one that this version does not train; all problems are listed.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path = folder / CONFIG_FILE
    raw = read_json(path)
    _refuse(path, unsupported(raw))
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers checks values with classes of errors of its own
        raise InputError(
            f"{path}: transformers cannot read it, {_one_line(error)}; give a complete Hugging Face model "
            "directory"
        ) from error
    text = config.get_text_config()
    model_type = raw.get("model_type")
    try:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise InputError(f'{path}: model_type "{model_type}" is no causal language model') from None
    if isinstance(kind, list | tuple):
        kind = kind[0]
    if text is not config and kind.config_class is not type(text):
        raise InputError(f'{path}: model_type "{model_type}" has no text-only model in transformers')
    _refuse(path, [*unsupported(text.to_dict()), *_class_problems(kind, text)])
    register()
    try:
        with torch.device("meta"):
            model = kind._from_config(text, attn_implementation=ATTENTION_NAME, dtype=torch.float32)
    except Exception as error:  # sizes that do not fit each other end in whatever the class divides by
        raise InputError(
            f"{path}: transformers cannot build the model, {_one_line(error)}; correct it"
        ) from error
    _refuse(path, _model_problems(model, text))
    return HuggingFacePolicy(model, text, is_recurrent=bool(kind._is_stateful))


def _class_problems(kind: Any, config: Any) -> list[str]:
    """List what a class of transformers does that the learner cannot."""
    problems = []
    is_known = config.model_type in RECURRENT_TYPES
    if not is_known and not getattr(kind, "_supports_attention_backend", False):
        problems.append(f"{kind.__name__} computes attention by itself; rows could not be kept apart")
    if not is_known and getattr(kind, "_is_stateful", False):
        known = ", ".join(RECURRENT_TYPES)
        problems.append(f"{kind.__name__} has recurrent layers; of those, only {known} are known here")
    return problems


def _model_problems(model: Any, config: Any) -> list[str]:
    """List what a built model has that the learner cannot take."""
    problems = []
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or embedding is None:
        return [f"{type(model).__name__} has no linear output head"]
    if head.bias is not None:
        problems.append("the output head has a bias; log-probs are computed without one")
    if config.tie_word_embeddings and head.weight.shape != embedding.weight.shape:
        problems.append(
            f"the head {list(head.weight.shape)} cannot be the embedding {list(embedding.weight.shape)}"
        )
    if _blocks_of(model.base_model, config) is None:
        problems.append(f"{type(model).__name__} has no list of num_hidden_layers layers")
    if any(".experts" in name or name.endswith(".router") for name, _ in model.named_modules()):
        problems.append("mixture of experts: router replay does not exist yet")
    others = [
        name
        for name, part in model.named_children()
        if part is not model.base_model and part is not head and any(True for _ in part.parameters())
    ]
    if others:
        problems.append(
            f"{', '.join(others)} beside backbone and head: log-probs are the head's product with the last "
            "hidden states, and nothing else"
        )
    loose = [name for name, _ in model.named_parameters(recurse=False)]
    if loose:
        problems.append(f"parameters outside its parts: {', '.join(loose)}")
    return problems


def _blocks_of(backbone: nn.Module, config: Any) -> nn.ModuleList | None:
    for part in backbone.children():
        if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers:
            return part
    return None


@torch.no_grad()
def _remake_tables(model: Any, policy: nn.Module) -> dict[str, Tensor]:
    """Compute the buffers that no file stores, as loading with transformers does, and put them in place.

    Returns:
        The tables by name, on the CPU.

    Raises:
        InputError: transformers leaves one of them empty.
    """
    tables: dict[str, Tensor] = {}
    for prefix, module in policy.named_modules():
        leaves = [name for name in module._buffers if name in module._non_persistent_buffers_set]
        for leaf in leaves:
            table = module._buffers[leaf]
            if table is not None:
                fill = float("nan") if table.is_floating_point() else 0
                module._buffers[leaf] = torch.full(table.shape, fill, dtype=table.dtype, device="cpu")
        if leaves:
            model._init_weights(module)
        for leaf in leaves:
            table = module._buffers[leaf]
            if table is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            if not table.isfinite().all():
                raise InputError(f"{type(model).__name__}: the table {name} cannot be made anew")
            tables[name] = table.clone()
    return tables


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return root.get_submodule(prefix), leaf


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise InputError([f"{path}: {problem}" for problem in dict.fromkeys(problems)])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
