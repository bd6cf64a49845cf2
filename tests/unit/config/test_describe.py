"""The configuration reference is the schema's own prose."""

from pathlib import Path

import msgspec

from cod_async.config import schema
from cod_async.config.describe import reference

ROOT = Path(__file__).parents[3]


def test_the_written_reference_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    hint = "run: .venv/bin/python -m cod_async.config.describe > docs/configuration.md"
    assert written == reference(), hint


def test_every_field_is_described() -> None:
    text = reference()
    for field in msgspec.structs.fields(schema.Config):
        kind = schema.EnvironmentConfig if field.name == "environments" else field.type
        for inner in msgspec.structs.fields(kind):
            assert f"`{inner.name}`" in text or f".{inner.name}`" in text
