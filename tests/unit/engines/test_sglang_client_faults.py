"""Everything that can go wrong between the client and a server, each with its error and its words."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeServer, expected_tokens
from msgspec.structs import replace

from cod_async.config.schema import ServerConfig
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang.client import ServerClient
from cod_async.errors import EngineDownError, EngineError, EngineMismatchError, EngineRefusedError

PROMPT = [5, 6, 7]
SCENARIO_S = 30.0
API_KEY, ADMIN_KEY = "api-5ecret", "admin-5ecret"
STREAMING = pytest.mark.parametrize("has_streaming", [True, False], ids=["stream", "plain"])
PARAMS = SamplingParams(max_tokens=40, stop_ids=frozenset())

Story = Callable[[FakeServer, ServerClient], Awaitable[None]]


def play(story: Story, *, server: FakeServer | None = None, vocab_size: int = 320, **settings: Any) -> None:
    """Run a story with a server and a client that has its keys."""

    async def run() -> None:
        fake = server or FakeServer(api_key=API_KEY, admin_key=ADMIN_KEY, token_s=0.0005)
        async with asyncio.timeout(SCENARIO_S), fake:
            client = ServerClient(
                fake.url,
                settings=ServerConfig(**settings),
                vocab_size=vocab_size,
                api_key=API_KEY,
                admin_key=ADMIN_KEY,
            )
            try:
                await story(fake, client)
            finally:
                await client.aclose()

    asyncio.run(run())


async def failing(server: FakeServer, call: Awaitable[object], kind: type[EngineError], words: str) -> Any:
    """Await a call that must fail so; its message names the url and no key."""
    with pytest.raises(EngineError, match=words) as caught:
        await call
    assert type(caught.value) is kind
    assert server.url in str(caught.value)
    assert API_KEY not in str(caught.value)
    assert ADMIN_KEY not in str(caught.value)
    return caught.value


# Connections


@STREAMING
def test_a_refused_connection(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        await server.stop_listening()
        await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, "/generate: cannot con"
        )
        await failing(server, client.load(), EngineDownError, "/v1/loads: cannot connect")
        await server.listen()
        assert (await client.generate(PROMPT, PARAMS, rid="a")).finish == "length"

    play(story, has_streaming=has_streaming)


def test_a_connection_that_never_opens() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        # A listener whose queue of connections is full: further ones get no answer to their first packet.
        with contextlib.ExitStack() as stack:
            import socket

            door = stack.enter_context(socket.socket())
            door.bind(("127.0.0.1", 0))
            door.listen(0)
            for _ in range(4):
                visitor = stack.enter_context(socket.socket())
                visitor.setblocking(False)
                visitor.connect_ex(door.getsockname())
            url = f"http://127.0.0.1:{door.getsockname()[1]}"
            settings = ServerConfig(connect_timeout_s=0.05)
            late = ServerClient(url, settings=settings, vocab_size=320)
            try:
                with pytest.raises(EngineDownError, match=f"{url}/generate: cannot connect"):
                    await late.generate(PROMPT, PARAMS, rid="a")
                with pytest.raises(EngineDownError, match=f"{url}/model_info: cannot connect"):
                    await late.label()
            finally:
                await late.aclose()

    play(story)


@STREAMING
def test_a_reset_before_the_answer(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.drops = {"/generate": 1, "/model_info": 2}
        error = await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, "/generate broke off"
        )
        assert error.num_tokens == 0
        assert len(server.bodies("/generate")) == 1  # the connection was new: nothing to make up for
        await failing(server, client.label(), EngineDownError, "/model_info broke off")
        assert server.paths().count("/model_info") == 2  # reading twice does no harm

    play(story, has_streaming=has_streaming)


@STREAMING
def test_a_stale_connection_is_replaced_once(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        await client.generate(PROMPT, PARAMS, rid="a")
        server.faults.drops = {"/generate": 1}
        made = await client.generate(PROMPT, PARAMS, rid="a")
        assert made.token_ids == expected_tokens(PROMPT, 40)
        rids = [body["rid"] for body in server.bodies("/generate")]
        assert len(rids) == len(set(rids)) == 3
        server.requests.clear()
        await client.generate(PROMPT, PARAMS, rid="a")
        server.faults.drops = {"/generate": 2}
        await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, "/generate broke off"
        )
        assert len(server.bodies("/generate")) == 3

    play(story, has_streaming=has_streaming)


def test_a_control_request_is_never_sent_twice() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        await client.set_label("x")
        server.faults.drops = {"/update_weight_version": 1}
        await failing(server, client.set_label("y"), EngineDownError, "/update_weight_version broke off")
        assert len(server.bodies("/update_weight_version")) == 2

    play(story)


@STREAMING
def test_a_reset_in_the_middle_counts_what_was_seen(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.reset_after_tokens = 30
        error = await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, "/generate broke off"
        )
        assert (0 < error.num_tokens <= 30) if has_streaming else error.num_tokens == 0
        await server.until(lambda: not server.running)

    play(story, has_streaming=has_streaming)


@STREAMING
def test_half_an_answer(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.is_half_answer = True
        error = await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, "/generate broke off"
        )
        assert error.num_tokens < 40

    play(story, has_streaming=has_streaming)


# Silence


def test_a_stream_that_falls_silent() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.stall_after_tokens = 10
        error = await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, r"silent for 0\.1 s"
        )
        assert 0 < error.num_tokens <= 10
        await server.until(lambda: "/abort_request" in server.paths())

    play(story, stall_timeout_s=0.1)


def test_a_paused_stream_is_not_a_silent_one() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        task = asyncio.create_task(client.generate(PROMPT, PARAMS, rid="a"))
        await server.until_tokens(5)
        await client.pause("in_place")
        await asyncio.wait({task}, timeout=0.3)
        assert not task.done()
        await client.resume()
        assert (await task).finish == "length"

    play(story, stall_timeout_s=0.1)


@STREAMING
def test_a_completion_has_a_deadline(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.stall_after_tokens = 10
        await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, r"did not finish within 0\.2 s"
        )
        await server.until(lambda: "/abort_request" in server.paths())

    play(story, has_streaming=has_streaming, request_timeout_s=0.2)


CONTROL: dict[str, Callable[[ServerClient], Awaitable[object]]] = {
    "/model_info": lambda client: client.label(),
    "/v1/loads": lambda client: client.load(),
    "/flush_cache": lambda client: client.flush_cache(),
    "/pause_generation": lambda client: client.pause("retract"),
    "/continue_generation": lambda client: client.resume(),
    "/begin_weight_update": lambda client: client.begin_update(),
    "/end_weight_update": lambda client: client.end_update(),
    "/update_weights_from_disk": lambda client: client.update_from_disk(Path("/w"), "x", is_flushing=True),
    "/update_weights_from_distributed": lambda client: client.update_from_group(
        [], "g", "x", is_flushing=True
    ),
    "/update_weights_from_tensor": lambda client: client.update_from_handles([], "x", is_flushing=True),
    "/init_weights_update_group": lambda client: client.open_group(
        address="h", port=1, rank_offset=1, world_size=2, group="g", backend="gloo"
    ),
    "/destroy_weights_update_group": lambda client: client.close_group("g"),
    "/update_weight_version": lambda client: client.set_label("x"),
    "/weights_checker": lambda client: client.checksums(),
}


@pytest.mark.parametrize("path", CONTROL)
def test_every_control_request_has_its_deadline_and_its_errors(path: str) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        call = CONTROL[path]
        server.faults.statuses = {path: [503, 418, 401]}
        await failing(server, call(client), EngineDownError, f"{path} answered 503: status 503 as asked")
        await failing(server, call(client), EngineRefusedError, f"{path} answered 418: status 418 as asked")
        await failing(server, call(client), EngineMismatchError, f"{path} answered 401: .* wants another")
        server.faults.hung_paths = {path}
        await failing(server, call(client), EngineDownError, rf"{path} did not answer within 0\.1 s")

    play(story, control_timeout_s=0.1, update_timeout_s=0.1, probe_timeout_s=0.1)


def test_everything_hangs() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.is_hung = True
        await failing(server, client.info(), EngineDownError, "did not answer within")
        await failing(server, client.load(), EngineDownError, "did not answer within")
        await failing(server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, "silent for|did not")

    play(story, control_timeout_s=0.1, probe_timeout_s=0.1, stall_timeout_s=0.1, request_timeout_s=0.2)


def test_the_probe_sees_a_stuck_scheduler_behind_a_server_that_answers() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        await client.load()
        server.faults.is_wedged = True
        assert await client.label() == "default"
        await client.pause("in_place")
        await failing(server, client.load(), EngineDownError, r"/server_info did not answer within 0\.1 s")

    play(story, probe_timeout_s=0.1)


# Statuses


@STREAMING
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (500, EngineDownError),
        (503, EngineDownError),
        (429, EngineDownError),
        (400, EngineRefusedError),
        (404, EngineRefusedError),
        (307, EngineRefusedError),
        (401, EngineMismatchError),
        (403, EngineMismatchError),
    ],
)
def test_statuses_of_completions(status: int, kind: type[EngineError], has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.statuses = {"/generate": [status, status]}
        for _ in range(2):
            await failing(
                server, client.generate(PROMPT, PARAMS, rid="a"), kind, f"answered {status}: status {status}"
            )
        assert (await client.generate(PROMPT, PARAMS, rid="a")).finish == "length"

    play(story, has_streaming=has_streaming)


@STREAMING
def test_a_request_that_is_too_long(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        wanted = SamplingParams(max_tokens=3000, stop_ids=frozenset())
        await failing(
            server,
            client.generate(PROMPT, wanted, rid="a"),
            EngineRefusedError,
            "answered 400: Requested token count exceeds",
        )

    play(story, has_streaming=has_streaming)


@STREAMING
@pytest.mark.parametrize(
    ("status", "kind"), [(500, EngineDownError), (503, EngineDownError), (400, EngineRefusedError)]
)
def test_aborts_with_a_status_are_errors(status: int, kind: type[EngineError], has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.abort_status = status
        await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), kind, f"answered {status}: aborted as asked"
        )

    play(story, has_streaming=has_streaming)


def test_wrong_keys_are_named_by_their_setting() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.api_key, server.admin_key = "other", "another"
        await failing(
            server, client.info(), EngineMismatchError, "another key: see engine.server.api_key_env"
        )
        await failing(
            server,
            client.generate(PROMPT, PARAMS, rid="a"),
            EngineMismatchError,
            "answered 401: Unauthorized",
        )
        await failing(server, client.pause("abort"), EngineMismatchError, "engine.server.admin_key_env")

    play(story)


def test_a_server_that_repeats_a_key_does_not_get_it_into_a_message() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.update_message = f"no luck\nwith {ADMIN_KEY} " + "x" * 1000
        await client.begin_update()
        error = await failing(
            server,
            client.update_from_handles([], "x", is_flushing=True),
            EngineRefusedError,
            r"no luck with \*\*\* xxx",
        )
        assert len(str(error)) < 700

    play(story)


# Nonsense


def _with(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Return an edit of an answer: a dotted path, and what to put there (``...``: remove it)."""

    def change(body: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place: Any = body
        for name in parents:
            place = place[int(name) if name.isdigit() else name]
        key = int(last) if last.isdigit() else last
        if value is ...:
            del place[key]
        else:
            place[key] = value

    return change


NONSENSE = {
    "no ids": (_with("output_ids", ...), "output_ids or meta_info is missing"),
    "no meta": (_with("meta_info", ...), "output_ids or meta_info is missing"),
    "no finish": (_with("meta_info.finish_reason", ...), "missing required field `finish_reason`"),
    "unfinished": (_with("meta_info.finish_reason", None), "ended without finish_reason"),
    "unknown finish": (_with("meta_info.finish_reason.type", "tired"), "Invalid enum value 'tired'"),
    "NaN sampled": (
        _with("meta_info.finish_reason", {"type": "stop", "matched": "NaN happened"}),
        "ended on 'NaN happened'",
    ),
    "no log-probs": (_with("meta_info.output_token_logprobs", ...), "0 log-probs for 40 tokens"),
    "one log-prob less": (_with("meta_info.output_token_logprobs.3", ...), "39 log-probs for 40 tokens"),
    "log-prob of another id": (_with("meta_info.output_token_logprobs.3.1", 1), "token 3 is of id 1"),
    "NaN log-prob": (_with("meta_info.output_token_logprobs.3.0", None), "token 3 is not a finite number"),
    "positive log-prob": (_with("meta_info.output_token_logprobs.3.0", 0.1), r"token 3 is 0\.1, above 0"),
    "log-prob as text": (_with("meta_info.output_token_logprobs.3.0", "-1"), "Expected `float"),
    "id outside": (_with("output_ids.3", 320), r"outside 0\.\.319"),
    "negative id": (_with("output_ids.3", -1), r"outside 0\.\.319"),
    "too few counted": (_with("meta_info.completion_tokens", 39), "counts 39 tokens and has 40"),
    "another prompt": (_with("meta_info.prompt_tokens", 9), "counts 9 prompt tokens, 3 were sent"),
    "spans too short": (_with("meta_info.weight_versions.0.end", 39), "cover 39 of 40"),
    "spans with a hole": (_with("meta_info.weight_versions.0.start", 1), "do not join at token 0"),
    "no spans": (_with("meta_info.weight_versions", []), "cover 0 of 40"),
    "empty": (lambda body: body.update(output_ids=[]), "it has 0 tokens, 1 to 40"),
    "too many": (lambda body: body["output_ids"].extend(range(9)), "it has 49 tokens, 1 to 40"),
}


@STREAMING
@pytest.mark.parametrize("case", NONSENSE)
def test_answers_that_contradict_themselves(case: str, has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.change, words = NONSENSE[case]
        await failing(
            server,
            client.generate(PROMPT, PARAMS, rid="a"),
            EngineDownError,
            f"/generate answered nonsense: .*{words}",
        )

    play(story, has_streaming=has_streaming)


@STREAMING
def test_a_page_instead_of_json(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.is_not_json = True
        await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, "nonsense: JSON is malformed"
        )

    play(story, has_streaming=has_streaming)


@STREAMING
def test_a_rounding_above_zero_is_clipped(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.change = _with("meta_info.output_token_logprobs.3.0", 5e-7)
        made = await client.generate(PROMPT, PARAMS, rid="a")
        assert made.logprobs[3] == 0.0

    play(story, has_streaming=has_streaming)


@STREAMING
def test_an_endless_answer_is_cut(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.change = _with("text", "x" * 2_000_000)
        await failing(
            server,
            client.generate(PROMPT, PARAMS, rid="a"),
            EngineDownError,
            "sent an (event|answer) of over",
        )

    play(story, has_streaming=has_streaming)


def test_a_stop_token_in_the_last_place_is_a_stop_whatever_the_server_calls_it() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        whole = await client.generate(PROMPT, PARAMS, rid="a")
        last = whole.token_ids[-1]
        number = whole.token_ids.index(last) + 1

        def change(body: dict[str, Any]) -> None:
            body["meta_info"]["finish_reason"] = {"type": "length", "length": number}

        server.faults.change = change
        asked = replace(PARAMS, max_tokens=number, stop_ids=frozenset([last]))
        made = await client.generate(PROMPT, asked, rid="b")
        assert made.finish == "stop" and made.token_ids == whole.token_ids[:number]

    play(story)


def test_a_stop_that_nobody_asked_for() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        def change(body: dict[str, Any]) -> None:
            body["meta_info"]["finish_reason"] = {"type": "stop", "matched": body["output_ids"][-1]}

        server.faults.change = change
        await failing(
            server, client.generate(PROMPT, PARAMS, rid="a"), EngineDownError, "although asked not to"
        )

    play(story)


def test_information_that_makes_no_sense() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.server_args = {"tp_size": "two"}
        await failing(
            server, client.info(), EngineDownError, "/server_info answered nonsense: Expected `int`"
        )
        server.server_args = {"max_req_input_len": None, "max_total_num_tokens": None}
        await failing(server, client.info(), EngineMismatchError, "names neither max_req_input_len")

    play(story)


def test_ids_outside_the_vocabulary_would_have_killed_it() -> None:
    """What the client's check is there for: a client with a wrong vocabulary takes the server down."""

    async def story(server: FakeServer, client: ServerClient) -> None:
        await failing(server, client.generate([400], PARAMS, rid="a"), EngineDownError, "broke off")
        await failing(server, client.label(), EngineDownError, "broke off")

    play(story, vocab_size=500)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:1", "ftp://h:1", "http://", "http://h:1/x", "http://h:99999", "http://h:1?k=v"],
)
def test_what_is_not_a_url(url: str) -> None:
    with pytest.raises(EngineMismatchError, match=r"is not http://HOST:PORT; correct engine\.urls"):
        ServerClient(url, settings=ServerConfig(), vocab_size=8)


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(EngineMismatchError, match="is not http://HOST:PORT") as caught:
        ServerClient("http://me:pass@host:1", settings=ServerConfig(), vocab_size=8)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel"])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(EngineMismatchError, match="a key has characters") as caught:
        ServerClient("http://host:1", settings=ServerConfig(), vocab_size=8, api_key=key)
    assert key not in str(caught.value)


def test_a_closed_client_says_so() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        await client.aclose()
        await failing(server, client.label(), EngineDownError, "the client of .* is closed")

    play(story)
