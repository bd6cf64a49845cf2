"""Every exception of the project, each one saying what to do.

The tree has one root, :class:`CodError`. The command line turns the two families below into exit codes:
:class:`InputError` (the user's input is wrong, exit 2, all problems listed, no traceback) and everything
else (the work failed, exit 1). Code that catches must catch the narrowest class that it can do something
about.
"""

from __future__ import annotations

from collections.abc import Sequence


class CodError(Exception):
    """Root of all errors raised on purpose by this project."""


class InputError(CodError):
    """The user's input is wrong: a config, a flag, a file, a folder, a port.

    Args:
        problems: one sentence per problem, each naming the thing, its value and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(InputError):
    """One or more problems in a configuration, all of them at once."""


class EnvironmentInputError(InputError):
    """An environment was given a record, preset or option that it does not know."""


class WorkError(CodError):
    """The work failed although the input was fine (exit code 1)."""


class WireError(CodError):
    """A frame or message was refused.

    Args:
        code: stable machine-readable reason, counted and shown to the peer (for example ``bad_checksum``).
        detail: what was found, with the value.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code}: {detail}" if detail else code)


class ProtocolRefusedError(WireError):
    """The coordinator refused this client for good (wrong protocol version, wrong run); do not reconnect."""


class StoreError(CodError):
    """The run database cannot be opened, written or understood; nothing was acknowledged."""


class WeightsError(CodError):
    """A policy version is missing, half written, or not what its digest says; it was not loaded.

    Args:
        message: what happened, with the version.
        label: after a failed update of a server: what it says its weights are called, if it says so.
    """

    def __init__(self, message: str, *, label: str | None = None) -> None:
        self.label = label
        super().__init__(message)


class SupersededError(WeightsError):
    """Bringing a version here was given up because a newer one is wanted; get that one."""


class CheckpointError(CodError):
    """A checkpoint is missing or does not match its digest; use an older one."""


class EngineError(CodError):
    """The engine could not serve a request; the episode is counted as infrastructure, never as reward 0."""


class EngineClosedError(EngineError):
    """The engine was closed while the request was running."""


class EngineDownError(EngineError):
    """A server is gone, wedged, or broke an answer off; another one may do. Nothing was scored.

    Args:
        message: what happened, with the url.
        num_tokens: generated tokens that had been seen and are lost.
        label: after a failed weight update: what the server says its weights are called, if it says so.
    """

    def __init__(self, message: str, *, num_tokens: int = 0, label: str | None = None) -> None:
        self.num_tokens = num_tokens
        self.label = label
        super().__init__(message)


class EngineRefusedError(EngineError):
    """A server refused a request for what it is (status 4xx) and would refuse it again."""


class EngineMismatchError(EngineError):
    """A server is not what this run needs: key, model, tokenizer or release. Correct ``engine.urls``."""


class InfrastructureError(CodError):
    """Environment or engine failed, not the policy; the episode is retried, never scored."""


class NumericsError(WorkError):
    """A loss, gradient or log-prob is not finite; parameters were not touched, the batch was kept."""
