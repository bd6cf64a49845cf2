"""What ``cod doctor --engine`` sees of right servers, and of servers that are wrong in one way each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from fake_sglang import FakeServer, Request, logprob_of

from cod_async.config.schema import ServerConfig
from cod_async.engines.conformance import Check, Finding, engine_checks, find
from cod_async.engines.conformance.asking import Subject
from cod_async.engines.sglang.conformance import ServerTarget, behavior, examine_server, identity
from cod_async.engines.sglang.conformance.target import SameWeights, ServerEngine
from cod_async.models.directory import save_model
from cod_async.models.qwen3 import Qwen3, Qwen3Config

from .helpers import run

VOCAB = 320
SETTINGS = ServerConfig(
    connect_timeout_s=2.0,
    stall_timeout_s=5.0,
    control_timeout_s=2.0,
    update_timeout_s=5.0,
    probe_timeout_s=0.3,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, max_position_embeddings=2048,
        eos_token_id=256,
    )  # fmt: skip
    save_model(path, Qwen3(config, torch.Generator().manual_seed(0)))
    return path


class RuleReference:
    """The log-probs that a fake server reports; no distribution, but one number per token."""

    vocab_size = VOCAB

    def __init__(self, weights: str) -> None:
        self._row = torch.tensor([logprob_of(token, weights) for token in range(VOCAB)], dtype=torch.float64)

    def logprobs(self, token_ids: Sequence[int], first: int, temperature: float) -> torch.Tensor:
        return self._row.expand(len(token_ids) - first + 1, -1)


def target(server: FakeServer, **changes: Any) -> ServerTarget:
    given: dict[str, Any] = {"api_key": server.api_key, "admin_key": server.admin_key, "allow_updates": True}
    return ServerTarget(url=server.url, settings=SETTINGS, **(given | changes))


def look(server: FakeServer, check: Callable[[FakeServer], Any], deadline_s: float = 20.0) -> Finding:
    """One check of one server."""

    async def main() -> Finding:
        async with server:
            return await find(Check("check", partial(check, server), deadline_s))

    finding: Finding = run(main())
    return finding


async def keys_of(server: FakeServer, **changes: Any) -> str:
    return await identity.keys(target(server, **changes))


@pytest.mark.parametrize(
    ("server_keys", "given", "status", "message"),
    [
        (("k", "a"), {}, "ok", "so is the api key"),
        (("k", ""), {}, "ok", "the same"),
        (("", ""), {}, "skipped", "no keys"),
        (("", ""), {"api_key": "k"}, "failed", "takes any api key"),
        (("k", "a"), {"api_key": "x", "admin_key": "x"}, "failed", "answered 401"),
        (("k", "a"), {"admin_key": ""}, "failed", "admin_key_env"),
        (("k", ""), {"admin_key": "a"}, "failed", "answered 401"),
    ],
)
def test_keys(server_keys: tuple[str, str], given: dict[str, str], status: str, message: str) -> None:
    server = FakeServer(api_key=server_keys[0], admin_key=server_keys[1])
    finding = look(server, partial(keys_of, **given))
    assert finding.status == status and message in finding.detail, finding


class OpenToApiKey(FakeServer):
    """Takes the api key for control requests as well."""

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("Authorization", "") not in ("Bearer k", "Bearer a"):
            return web.json_response({"error": "Unauthorized"}, status=401)
        self.requests.append((request.path, None))
        return await handler(request)  # type: ignore[no-any-return]


def test_an_api_key_that_opens_everything_is_found() -> None:
    finding = look(OpenToApiKey(api_key="k", admin_key="a"), keys_of)
    assert finding.status == "failed" and "alone may pause" in finding.detail


async def model_of(server: FakeServer, model_dir: Path, **changes: Any) -> str:
    info, text = await identity.reachable(target(server))
    assert server.release in text and "default" in text
    return await identity.model(target(server, **changes), info, model_dir)


def test_another_model_is_found(model_dir: Path, tmp_path: Path) -> None:
    finding = look(FakeServer(model_dir=model_dir), partial(model_of, model_dir=model_dir))
    assert finding.status == "ok" and "vocabulary 320" in finding.detail, finding
    finding = look(FakeServer(architecture="LlamaForCausalLM"), partial(model_of, model_dir=model_dir))
    assert finding.status == "failed" and "LlamaForCausalLM" in finding.detail
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 352}))
    finding = look(FakeServer(model_dir=model_dir), partial(model_of, model_dir=tmp_path))
    assert finding.status == "failed" and "vocab_size 320" in finding.detail
    longer = partial(model_of, model_dir=model_dir, max_context_tokens=4096)
    finding = look(FakeServer(model_dir=model_dir), longer)
    assert finding.status == "failed" and "needs 4096" in finding.detail


def test_an_old_release_is_found(model_dir: Path) -> None:
    finding = look(FakeServer(release="0.5.16"), partial(model_of, model_dir=model_dir))
    assert finding.status == "failed" and "0.5.17 or newer" in finding.detail


class Subjects:
    """A client, an engine and a subject of a fake server."""

    def __init__(self, server: FakeServer, info: Any, model_dir: Path | None = None) -> None:
        self.client = target(server).client(VOCAB)
        self.engine = ServerEngine(self.client, info)
        reference = RuleReference(server.weights)
        self.subject = Subject(engine=self.engine, vocab_size=VOCAB, reference=reference)
        if model_dir is not None:
            updater = SameWeights(self.engine, model_dir, reference, self.subject)
            self.subject = Subject(engine=self.engine, vocab_size=VOCAB, reference=reference, updater=updater)


async def with_subject(
    server: FakeServer, act: Callable[[Subjects, Any], Any], model_dir: Path | None = None
) -> str:
    info, _ = await identity.reachable(target(server))
    subjects = Subjects(server, info, model_dir)
    try:
        text: str = await act(subjects, info)
        return text
    finally:
        await subjects.client.aclose()


async def prefix_cache_of(server: FakeServer) -> str:
    return await with_subject(server, lambda it, info: behavior.prefix_cache(it.subject, it.engine, info))


class OneCache(FakeServer):
    """Shares cached prefixes among all namespaces."""

    def _match(self, item: Request) -> int:
        self.cache[item.extra_key] = [row for rows in self.cache.values() for row in rows]
        return super()._match(item)


class NoCache(FakeServer):
    """Keeps nothing."""

    def _match(self, item: Request) -> int:
        return 0


def test_prefix_caches_that_mix_versions_or_keep_nothing_are_found() -> None:
    finding = look(FakeServer(), prefix_cache_of)
    assert finding.status == "ok" and "again 127, under another version 0" in finding.detail, finding
    finding = look(OneCache(), prefix_cache_of)
    assert finding.status == "failed" and "serve another" in finding.detail
    finding = look(NoCache(), prefix_cache_of)
    assert finding.status == "failed" and "nothing is kept" in finding.detail


async def abort_of(server: FakeServer) -> str:
    return await with_subject(server, lambda it, info: behavior.abort_at_server(it.subject, it.engine))


class NeverGone(FakeServer):
    """Counts requests as running after they are gone."""

    async def _loads(self, request: web.Request) -> web.Response:
        response = await super()._loads(request)
        answer = json.loads(response.body)  # type: ignore[arg-type]
        answer["loads"][0]["num_running_reqs"] = len(self.bodies("/generate"))
        return web.json_response(answer)


def test_requests_that_outlive_their_caller_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behavior, "ABORT_LIMIT_S", 0.3)
    finding = look(FakeServer(token_s=0.005), abort_of)
    assert finding.status == "ok" and "gone from the server" in finding.detail, finding
    finding = look(NeverGone(token_s=0.005), abort_of)
    assert finding.status == "failed" and "still runs a request" in finding.detail


async def probe_of(server: FakeServer, **changes: Any) -> str:
    return await with_subject(
        server, lambda it, info: behavior.probe_while_paused(target(server, **changes), it.subject, it.engine)
    )


class DeafWhilePaused(FakeServer):
    """Answers no probe while it is paused."""

    async def _pause(self, request: web.Request) -> web.Response:
        self.faults.hung_paths.add("/v1/loads")
        return await super()._pause(request)


class NeverPauses(FakeServer):
    """Says that it has paused."""

    async def _pause(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


def test_servers_that_are_deaf_or_busy_while_paused_are_found() -> None:
    assert look(FakeServer(), probe_of).status == "ok"
    assert look(FakeServer(), partial(probe_of, allow_updates=False)).status == "skipped"
    server = DeafWhilePaused()
    finding = look(server, probe_of)
    assert finding.status == "failed" and "/v1/loads" in finding.detail
    assert server.paths()[-1] != "/pause_generation" and "/continue_generation" in server.paths()
    finding = look(NeverPauses(), probe_of)
    assert finding.status == "failed" and "went on" in finding.detail


async def lost_client_of(server: FakeServer) -> str:
    return await with_subject(
        server, lambda it, info: behavior.survives_lost_client(target(server), it.subject, it.engine)
    )


class NeverResumes(FakeServer):
    """Says that it goes on."""

    async def _continue(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


def test_a_server_that_stays_paused_is_found() -> None:
    finding = look(FakeServer(), lost_client_of)
    assert finding.status == "ok", finding
    finding = look(NeverResumes(), lost_client_of, deadline_s=1.0)
    assert finding.status == "failed" and "not done within" in finding.detail


async def update_of(server: FakeServer, model_dir: Path) -> str:
    return await with_subject(
        server, lambda it, info: engine_checks(it.subject)[-1].run(), model_dir=model_dir
    )


def test_the_same_weights_go_in_and_the_label_comes_back(model_dir: Path, tmp_path: Path) -> None:
    server = FakeServer(model_dir=model_dir, token_s=0.001)
    weights = server.weights
    finding = look(server, partial(update_of, model_dir=model_dir))
    assert finding.status == "ok" and "6 of 6 completions span it" in finding.detail, finding
    assert (server.label, server.weights, server.is_paused) == ("default", weights, False)
    (body,) = server.bodies("/update_weights_from_disk")
    assert body["flush_cache"] is True and body["model_path"] == str(model_dir.resolve())
    # A folder with other weights than the server's is left alone.
    server = FakeServer(model_dir=model_dir)
    server.weights = "other"

    async def foreign(server: FakeServer) -> str:
        info, _ = await identity.reachable(target(server))
        subjects = Subjects(server, info)
        updater = SameWeights(subjects.engine, model_dir, RuleReference("default"), subjects.subject)
        try:
            await updater.prepare()
            return "loaded"
        finally:
            await subjects.client.aclose()

    finding = look(server, foreign)
    assert finding.status == "skipped" and "left alone" in finding.detail
    assert not server.bodies("/update_weights_from_disk")
    # A folder that the server does not see: refused, and the server goes on with what it had.
    server = FakeServer(model_dir=model_dir, token_s=0.001)
    finding = look(server, partial(update_of, model_dir=tmp_path / "nowhere"))
    assert finding.status == "failed" and "update_weights_from_disk" in finding.detail, finding
    assert (server.label, server.is_paused) == ("default", False)


def test_unknown_labels_are_errors() -> None:
    async def act(server: FakeServer) -> str:
        async def changed(it: Subjects, info: Any) -> str:
            server.label = server.scheduler_label = "stranger"
            await it.engine.generate([1], _params(2))
            return "answered"

        return await with_subject(server, changed)

    finding = look(FakeServer(), act)
    assert finding.status == "failed" and '"stranger" turned up' in finding.detail


def _params(max_tokens: int) -> Any:
    from cod_async.engines.conformance.asking import params

    return params(max_tokens, seed=0)


def test_a_whole_examination_of_a_server_with_other_weights(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that samples by a rule of its own is not the model, and nothing of it is changed."""
    monkeypatch.setattr("cod_async.engines.conformance.sampling.EOS_TRIES", 1)
    heard: list[Finding] = []

    async def main() -> list[Finding]:
        async with FakeServer(model_dir=model_dir, api_key="k", admin_key="a") as server:
            found = await examine_server(target(server), heard.append, deadline_s=60.0)
            assert not server.bodies("/update_weights_from_disk") and server.label == "default"
            return found

    found: list[Finding] = run(main())
    assert found == heard
    statuses = {finding.check: finding.status for finding in found}
    assert statuses["server_answers"] == statuses["server_keys"] == statuses["server_model"] == "ok"
    assert statuses["logprob_parity"] == statuses["batch_equals_one_by_one"] == "failed"
    assert statuses["samples_follow_logprobs"] == "failed"
    assert statuses["live_update"] == "skipped"
    assert statuses["length_limit"] == statuses["foreign_ids"] == "ok", found


def test_an_examination_ends_where_it_makes_no_sense_to_go_on() -> None:
    async def main(**changes: Any) -> list[Finding]:
        async with FakeServer(api_key="k") as server:
            return await examine_server(target(server, **changes), lambda finding: None)

    assert [(f.check, f.status) for f in run(main(api_key="x"))] == [("server_answers", "failed")]
    found = run(main())
    assert found[-1].check == "server_model" and "--model" in found[-1].detail
