"""The typed configuration of a run: schema, loading with every problem listed at once, cross-field checks.

TOML files and dotted overrides become one frozen :class:`~cod_async.config.schema.Config`; machines write and
read the resolved tree as JSON. Nothing here loads torch, transformers or zmq, so tools can read configs in
milliseconds.
"""

from cod_async.config.load import config_digest, load_config, load_resolved, save_resolved
from cod_async.config.schema import Config

__all__ = ["Config", "config_digest", "load_config", "load_resolved", "save_resolved"]
