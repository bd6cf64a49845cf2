"""The embedded engine under examination: a run's model, against transformers, in the run's own settings."""

from __future__ import annotations

from pathlib import Path

from cod_async.config.schema import Config
from cod_async.engines.conformance import Check, engine_checks
from cod_async.engines.conformance.asking import Subject
from cod_async.engines.conformance.findings import CheckSkippedError
from cod_async.engines.conformance.reference import Reference, TransformersReference, bytes_needed
from cod_async.engines.conformance.updating import SwitchMode
from cod_async.engines.embedded.engine import EmbeddedEngine
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import load_model, weights_of
from cod_async.models.qwen3 import Qwen3

NEXT_STEP = 1


class SwappedWeights:
    """Switches an embedded engine to the same weights under the next version, and back."""

    has_other_weights = False
    goes_back = True

    def __init__(self, engine: EmbeddedEngine, model: Qwen3, reference: Reference, mode: SwitchMode) -> None:
        self.mode: SwitchMode = mode
        self._engine, self._model, self._reference = engine, model, reference
        self._first = engine.version

    async def prepare(self) -> None:
        """Nothing to do: the weights are at hand."""

    async def switch(self) -> tuple[Version, Reference]:
        """Switch between two tokens."""
        version = Version(self._first.lineage, self._first.step + NEXT_STEP)
        self._engine.swap_weights(weights_of(self._model), version)
        return version, self._reference

    async def restore(self) -> Version:
        """Give the version back."""
        if self._engine.version != self._first:
            self._engine.swap_weights(weights_of(self._model), self._first)
        return self._engine.version


def embedded_checks(config: Config, model_dir: Path, max_bytes: int) -> tuple[list[Check], EmbeddedEngine]:
    """Return the checks of the embedded engine with a model, and the engine, which the caller closes.

    Args:
        config: the run's configuration.
        model_dir: the model.
        max_bytes: most bytes of float32 weights.

    Raises:
        InputError: the model cannot be loaded.
        CheckSkippedError: it is larger than that.
    """
    needed = bytes_needed(model_dir)
    if needed > max_bytes:
        raise CheckSkippedError(
            f"{model_dir} takes {needed / 2**30:.1f} GiB in float32, more than {max_bytes / 2**30:g} GiB"
        )
    model, reference = load_model(model_dir), TransformersReference(model_dir)
    engine = EmbeddedEngine(
        model,
        config.engine,
        max_context_tokens=config.model.max_context_tokens,
        version=Version(0, 0),
        run_dir=model_dir.parent,
    )
    # Swapping does not hold requests back: what is kept of the old weights is all that the modes differ in.
    mode: SwitchMode = "in_place" if config.engine.on_publish in ("auto", "in_place") else "retract"
    eos = model.config.eos_token_id
    subject = Subject(
        engine=engine,
        vocab_size=model.config.vocab_size,
        reference=reference,
        eos_ids=frozenset(token for token in (eos if isinstance(eos, list) else [eos]) if token is not None),
        updater=SwappedWeights(engine, model, reference, mode),
    )
    return engine_checks(subject), engine
