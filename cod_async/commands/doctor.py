"""``cod doctor``: everything that a run relies on, looked at before it is started.

``cod doctor CONFIG`` looks at the configuration, this machine, the environments and the model;
``cod doctor --engine URL`` at a running SGLang server (:mod:`cod_async.engines.sglang.conformance`). What is
wrong is listed finding by finding; wrong input (the configuration, a url, a key, another model) ends with
exit code 2, anything else that fails with 1.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cod_async.commands.output import console_for_people, print_json
from cod_async.config.load import read_config
from cod_async.config.schema import Config, ServerConfig
from cod_async.engines.conformance.findings import Finding, Status
from cod_async.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

COLORS: dict[Status, str] = {"ok": "green", "failed": "red", "skipped": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to look at.

    Attributes:
        configs: TOML files, left to right.
        overrides: ``--set`` values.
        engine: url of a server; empty: the configuration's engine.
        model_dir: the model that the engine should serve; None: the configuration's, or the server's own.
        api_key_env, admin_key_env: names of environment variables that hold keys; empty: the configuration's.
        allow_updates: whether a server may be paused and its weights be loaded again.
        is_json: answer as JSON.
    """

    configs: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    engine: str = ""
    model_dir: Path | None = None
    api_key_env: str = ""
    admin_key_env: str = ""
    allow_updates: bool = False
    is_json: bool = False


class Reporter:
    """Collects findings, and shows progress to people while they come."""

    def __init__(self, *, is_json: bool) -> None:
        self.findings: list[Finding] = []
        self.input_checks: set[str] = set()
        self._is_json = is_json

    def __call__(self, finding: Finding) -> None:
        """Take a finding."""
        self.findings.append(finding)
        if not self._is_json and sys.stderr.isatty():
            sys.stderr.write(f"{finding.status:8}{finding.check}\n")
            sys.stderr.flush()

    @property
    def exit_code(self) -> int:
        """0: nothing failed; 2: input is wrong; 1: something else failed."""
        failed = {finding.check for finding in self.findings if finding.status == "failed"}
        return 2 if failed & self.input_checks else int(bool(failed))

    def show(self) -> None:
        """Print the findings on standard output, and wrong input on standard error too."""
        if self._is_json:
            print_json([msgspec.to_builtins(finding) for finding in self.findings])
        else:
            console_for_people().print(_table(self.findings))
        for finding in self.findings:
            if finding.status == "failed" and finding.check in self.input_checks:
                sys.stderr.write(f"{finding.check}: {finding.detail}\n")


def _table(findings: Sequence[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="doctor", title_justify="left")
    for column in ("check", "status", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        status = Text(finding.status, style=COLORS[finding.status])
        table.add_row(Text(finding.check), status, Text(finding.detail))
    return table


def run_doctor(request: Request) -> int:
    """Look, print what was found, and return the exit code.

    Raises:
        InputError: nothing to look at, a configuration that cannot be read, or a variable without a key.
    """
    if not request.configs and not request.engine:
        raise InputError("nothing to look at; give a CONFIG, or --engine URL")
    if request.engine and not request.engine.startswith(("http://", "https://")):
        raise InputError(f"--engine {request.engine}: not http://HOST:PORT; give the address of a server")
    if request.model_dir is not None and not (request.model_dir / "config.json").is_file():
        raise InputError(f"--model {request.model_dir}: no config.json in it; give a model directory")
    reporter = Reporter(is_json=request.is_json)
    config: Config | None = None
    if request.configs:
        config = _read(request, reporter)
    servers = _servers(request, config)
    if config is not None:
        from cod_async.commands.doctor_checks import examine_config

        examine_config(config, reporter, has_servers=bool(servers), model_dir=request.model_dir)
    if config is not None or not request.configs:
        _examine_servers(request, config, servers, reporter)
    reporter.show()
    return reporter.exit_code


def _read(request: Request, reporter: Reporter) -> Config | None:
    """Read the configuration and report what is wrong with it; None if it cannot be used at all."""
    from cod_async.config.check import NO_ENVIRONMENTS, check

    config, problems = read_config(request.configs, request.overrides)
    if config is not None:
        crossed = check(config)
        if problems:  # a refused environment was left out, which is not the same as none being given
            crossed = [problem for problem in crossed if not problem.startswith(NO_ENVIRONMENTS)]
        problems += crossed
    reporter.input_checks.add("config")
    names = ", ".join(map(str, request.configs))
    if not problems:
        reporter(Finding("config", "ok", f"{names}: nothing wrong"))
    for problem in problems:
        reporter(Finding("config", "failed", problem))
    return config


def _servers(request: Request, config: Config | None) -> tuple[str, ...]:
    if request.engine:
        return (request.engine,)
    return config.engine.urls if config is not None and config.engine.kind == "sglang" else ()


def _key(flag: str, name: str) -> str:
    """Return the key in an environment variable.

    Raises:
        InputError: the variable is not set. Its name is not repeated if it may be the key itself.
    """
    if not name:
        return ""
    key = os.environ.get(name, "")
    if not key:
        shown = name if name.replace("_", "").isalnum() and name.isupper() else "what was given"
        raise InputError(f"{flag}: {shown} names no variable that is set; export the key under that name")
    return key


def _examine_servers(
    request: Request, config: Config | None, urls: Sequence[str], reporter: Reporter
) -> None:
    if not urls:
        return
    from cod_async.engines.sglang.conformance import INPUT_CHECKS, ServerTarget, examine_server

    settings = ServerConfig() if config is None else config.engine.server
    model_dir = request.model_dir
    if model_dir is None and config is not None and config.model.path:
        model_dir = Path(config.model.path)
    api_key = _key("--api-key-env", request.api_key_env or settings.api_key_env)
    admin_key = _key("--admin-key-env", request.admin_key_env or settings.admin_key_env)

    def report_as(url: str) -> Callable[[Finding], None]:
        def report(finding: Finding) -> None:
            name = finding.check if len(urls) == 1 else f"{finding.check} {url}"
            if finding.check in INPUT_CHECKS:
                reporter.input_checks.add(name)
            reporter(Finding(name, finding.status, finding.detail))

        return report

    for url in urls:
        target = ServerTarget(
            url=url,
            api_key=api_key,
            admin_key=admin_key,
            settings=settings,
            model_dir=model_dir,
            max_context_tokens=None if config is None else config.model.max_context_tokens,
            allow_updates=request.allow_updates,
        )
        asyncio.run(examine_server(target, report_as(url)))
