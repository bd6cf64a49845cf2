"""A model directory from a checkpoint, whatever ranks wrote it, without its optimizer.

Names, types, tokenizer and everything that is not trained come from the run's starting model; adapters are
merged. Needs host memory for the model in float32.
"""

from __future__ import annotations

from pathlib import Path

from cod_async.config.load import load_resolved
from cod_async.errors import CheckpointError, InputError
from cod_async.learner.checkpoints.record import WEIGHTS_KIND, checkpoint_folder, read_record
from cod_async.learner.checkpoints.state import load_weights
from cod_async.lifecycle.segment import Version
from cod_async.models.export import save_policy
from cod_async.models.loading import load_policy

MODEL_FOLDER = "model"
"""The run's starting model."""


def assemble_model(run_dir: Path, version: Version, out: Path) -> None:
    """Write the weights of a checkpoint as a Hugging Face model directory.

    Args:
        run_dir: the run folder.
        version: of the checkpoint.
        out: directory that does not exist yet, or is empty; it appears when it is whole.

    Raises:
        InputError: the checkpoint is missing or damaged, or ``out`` cannot be written.
    """
    source = run_dir / MODEL_FOLDER
    try:
        read_record(run_dir, version, kinds=(WEIGHTS_KIND,))
        policy = load_policy(source, lora=load_resolved(run_dir).learner.lora)
        load_weights(policy, run_dir / checkpoint_folder(version))
    except CheckpointError as error:
        raise InputError(str(error)) from error
    save_policy(out, policy, source=source)
