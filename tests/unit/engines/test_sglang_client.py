"""The client of one SGLang server against a server with the real shapes: completions and control."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import EOS, FakeServer, expected_tokens, logprob_of

from cod_async.config.schema import ServerConfig
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.protocol import Generated, LabelSpan, TensorSpec
from cod_async.errors import EngineDownError, EngineError, EngineMismatchError, EngineRefusedError

PROMPT = [5, 6, 7]
SCENARIO_S = 30.0
STREAMING = pytest.mark.parametrize("has_streaming", [True, False], ids=["stream", "plain"])


def params(max_tokens: int = 20, stop_ids: frozenset[int] = frozenset(), **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_ids=stop_ids, **more)


def client_of(server: FakeServer, *, has_streaming: bool = True, **changes: Any) -> ServerClient:
    settings = ServerConfig(has_streaming=has_streaming, **changes)
    return ServerClient(
        server.url,
        settings=settings,
        vocab_size=server.vocab_size,
        api_key=server.api_key,
        admin_key=server.admin_key,
    )


def play(
    story: Callable[[FakeServer, ServerClient], Awaitable[None]],
    *,
    server: FakeServer | None = None,
    has_streaming: bool = True,
    **settings: Any,
) -> None:
    """Run a story with a server and a client of it."""

    async def run() -> None:
        async with asyncio.timeout(SCENARIO_S), server or FakeServer() as fake:
            client = client_of(fake, has_streaming=has_streaming, **settings)
            try:
                await story(fake, client)
            finally:
                await client.aclose()

    asyncio.run(run())


# Completions


@STREAMING
def test_a_completion_is_what_the_server_sampled(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        made = await client.generate(PROMPT, params(), rid="a", namespace="L0-S0")
        ids = expected_tokens(PROMPT, 20)
        assert made == Generated(
            token_ids=ids,
            logprobs=[logprob_of(token, "default") for token in ids],
            spans=(LabelSpan("default", 20),),
            finish="length",
            num_prompt_tokens=3,
            num_cached_tokens=0,
            num_retractions=0,
        )
        again = await client.generate(PROMPT + ids, params(2), rid="a", namespace="L0-S0")
        assert again.num_cached_tokens == 22  # the last id of the first row was never computed
        other = await client.generate(PROMPT + ids, params(2), rid="a", namespace="L0-S1")
        assert other.num_cached_tokens == 0

    play(story, has_streaming=has_streaming)


def test_every_sampling_parameter_is_sent() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        wanted = params(700, frozenset((9, 4)), temperature=0.7, top_p=0.9, seed=5)
        await client.generate(PROMPT, wanted, rid="life-1", namespace="L1-S2")
        (body,) = server.bodies("/generate")
        assert body.pop("rid").startswith("life-1~")
        assert body == {
            "input_ids": PROMPT,
            "sampling_params": {
                "max_new_tokens": 700, "min_new_tokens": 0, "temperature": 0.7, "top_p": 0.9, "top_k": -1,
                "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
                "n": 1, "stop_token_ids": [4, 9], "ignore_eos": False, "stream_interval": 50,
            },
            "return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 0,
            "return_text_in_logprobs": False, "stream": True, "extra_key": "L1-S2",
        }  # fmt: skip

    play(story, server=FakeServer(rule=lambda context, weights, vocab_size: 9))


def test_a_seed_is_sent_to_servers_that_heed_it() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.server_args = {"enable_deterministic_inference": True}
        await client.generate(PROMPT, params(1, seed=5), rid="a")
        await client.info()
        await client.generate(PROMPT, params(1, seed=5), rid="a")
        seeds = [body["sampling_params"].get("sampling_seed") for body in server.bodies("/generate")]
        assert seeds == [None, 5]

    play(story)


@STREAMING
def test_it_stops_on_the_wanted_ids_and_on_no_others(has_streaming: bool) -> None:
    row: list[int] = [1, 2, EOS, 3, EOS, 4, 9, 5]

    def rule(context: Sequence[int], weights: str, vocab_size: int) -> int:
        return row[len(context) - len(PROMPT)]

    async def story(server: FakeServer, client: ServerClient) -> None:
        made = await client.generate(PROMPT, params(8, frozenset({9})), rid="a")
        assert (made.token_ids, made.finish) == (row[:7], "stop")
        assert made.logprobs == [logprob_of(token, "default") for token in row[:7]]
        assert made.spans == (LabelSpan("default", 7),)
        assert made.num_prompt_tokens == 3
        # The server stopped twice on its own end of text: three requests, each a continuation.
        assert [body["input_ids"] for body in server.bodies("/generate")] == [
            PROMPT, PROMPT + row[:3], PROMPT + row[:5]
        ]  # fmt: skip
        assert [b["sampling_params"]["max_new_tokens"] for b in server.bodies("/generate")] == [8, 5, 3]

        made = await client.generate(PROMPT, params(5, frozenset({9})), rid="a")
        assert (made.token_ids, made.finish) == (row[:5], "length")
        made = await client.generate(PROMPT, params(8, frozenset({EOS, 9})), rid="a")
        assert (made.token_ids, made.finish) == (row[:3], "stop")
        made = await client.generate(PROMPT, params(8), rid="a")
        assert (made.token_ids, made.finish) == (row, "length")

    play(story, server=FakeServer(rule=rule), has_streaming=has_streaming)


def test_sixty_four_at_once() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        prompts = [[number, 3] for number in range(64)]
        made = await asyncio.gather(
            *(client.generate(row, params(12), rid=f"r{row[0]}") for row in prompts),
        )
        assert [one.token_ids for one in made] == [expected_tokens(row, 12) for row in prompts]
        assert server.num_connections <= 64

    play(story)


def test_control_does_not_wait_behind_completions() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        tasks = [asyncio.create_task(client.generate(PROMPT, params(2000), rid=f"r{i}")) for i in range(8)]
        await server.until(lambda: len(server.running) == 8)
        assert (await client.load()).num_running == 8
        await client.pause("abort")
        assert [one.finish for one in await asyncio.gather(*tasks)] == ["abort"] * 8
        await client.resume()

    play(story, server=FakeServer(token_s=0.001))


def test_kept_connections_are_used_again() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        for _ in range(5):
            await client.generate(PROMPT, params(3), rid="a")
        assert server.num_connections == 1

    play(story)


@STREAMING
def test_an_abort_returns_what_came_so_far(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        task = asyncio.create_task(client.generate(PROMPT, params(2000), rid="a"))
        other = asyncio.create_task(client.generate(PROMPT, params(100), rid="ab"))
        await server.until_tokens(5)
        await client.abort("a")
        await client.abort("unknown")
        made = await task
        assert made.finish == "abort"
        assert made.token_ids == expected_tokens(PROMPT, len(made.token_ids))
        assert 5 <= len(made.token_ids) == sum(span.num_tokens for span in made.spans) < 2000
        assert (await other).finish == "length"

    play(story, server=FakeServer(token_s=0.001), has_streaming=has_streaming)


@STREAMING
def test_a_retracted_request_that_is_aborted_keeps_its_tokens(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        task = asyncio.create_task(client.generate(PROMPT, params(2000), rid="a"))
        await server.until_tokens(5)
        await client.pause("retract")
        await client.abort("a")
        made = await task
        assert (made.finish, made.num_retractions) == ("abort", 1)
        await client.resume()

    play(story, server=FakeServer(token_s=0.001), has_streaming=has_streaming)


@STREAMING
def test_cancelling_aborts_on_the_server(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        task = asyncio.create_task(client.generate(PROMPT, params(500), rid="a"))
        await server.until_tokens(20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (body,) = server.bodies("/abort_request")
        assert body == {"rid": server.bodies("/generate")[0]["rid"]}
        await server.until(lambda: not server.running)
        assert (client.num_cancelled_tokens > 0) == has_streaming
        assert (await client.generate(PROMPT, params(2), rid="a")).finish == "length"

    play(story, server=FakeServer(token_s=0.001), has_streaming=has_streaming)


@STREAMING
def test_cancelling_at_the_door_of_a_paused_server_aborts_afterwards(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        await client.pause("in_place")
        task = asyncio.create_task(client.generate(PROMPT, params(500), rid="a"))
        await server.until(lambda: "/generate" in server.paths())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "/abort_request" not in server.paths()
        await client.resume()
        await server.until(lambda: "/abort_request" in server.paths() and not server.running)

    play(story, server=FakeServer(token_s=0.001), has_streaming=has_streaming)


def test_cancelling_does_not_wait_for_a_server_that_hangs() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.faults.hung_paths = {"/abort_request"}
        task = asyncio.create_task(client.generate(PROMPT, params(2000), rid="a"))
        await server.until_tokens(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task  # the abort fails by its own deadline

    play(story, server=FakeServer(token_s=0.001), control_timeout_s=0.05)


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 320], {}, r"token id 320 is outside 0\.\.319"),
        ([-1], {}, "token id -1 is outside"),
        ([True], {}, "token id True is outside"),
        ([1.0], {}, r"token id 1\.0 is outside"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1], {"temperature": 0.0}, r"temperature is 0\.0"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"top_p": 0.0}, r"top_p is 0\.0"),
        ([1], {"stop_ids": frozenset({320})}, "a stop id is outside"),
    ],
)
def test_bad_arguments_never_reach_a_server(row: list[Any], changes: dict[str, Any], message: str) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        with pytest.raises(EngineError, match=message):
            await client.generate(row, params(**changes), rid="a")
        for rid in ("", "a~1"):
            with pytest.raises(EngineError, match="cannot name a request"):
                await client.generate([1], params(), rid=rid)
        assert server.paths() == []

    play(story)


def test_two_running_requests_need_two_names() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        task = asyncio.create_task(client.generate(PROMPT, params(50), rid="a"))
        await server.until_tokens(1)
        with pytest.raises(EngineError, match="'a' is running"):
            await client.generate(PROMPT, params(), rid="a")
        await task

    play(story, server=FakeServer(token_s=0.001))


# Versions


@STREAMING
@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_spans_across_a_change_of_weights(mode: Any, has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        await client.set_label("L0-S0")
        task = asyncio.create_task(client.generate(PROMPT, params(60), rid="a"))
        await server.until_tokens(10)
        await client.pause(mode)
        num_old = len(server.running[next(iter(server.running))].output)
        await client.begin_update()
        await client.open_group(
            address="127.0.0.1", port=1, rank_offset=1, world_size=2, group="g", backend="gloo"
        )
        spec = TensorSpec("lm_head.weight", "float32", (3, 4))
        await client.update_from_group([spec], "g", "L0-S1", is_flushing=mode == "retract")
        await client.close_group("g")
        await client.end_update()
        await client.resume()
        made = await task
        assert made.spans == (LabelSpan("L0-S0", num_old), LabelSpan("L0-S1", 60 - num_old))
        assert made.num_retractions == (mode == "retract")
        assert await client.label() == "L0-S1"
        old = expected_tokens(PROMPT, num_old)
        assert made.token_ids == old + expected_tokens(PROMPT + old, 60 - num_old, "group L0-S1")
        (body,) = server.bodies("/update_weights_from_distributed")
        assert body == {
            "names": ["lm_head.weight"], "dtypes": ["float32"], "shapes": [[3, 4]], "group_name": "g",
            "weight_version": "L0-S1", "flush_cache": mode == "retract", "abort_all_requests": False,
        }  # fmt: skip

    play(story, server=FakeServer(token_s=0.001), has_streaming=has_streaming)


def test_an_older_server_names_one_version_for_all_tokens() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        assert (await client.info()).release == "0.5.18"
        assert not client.has_version_spans
        await client.begin_update()  # it knows no such thing, which is fine
        await client.end_update()
        await client.set_label("L0-S0")
        made = await client.generate(PROMPT, params(5), rid="a")
        assert made.spans == (LabelSpan("L0-S0", 5),)
        task = asyncio.create_task(client.generate(PROMPT, params(50), rid="a"))
        await server.until_tokens(5)
        await client.set_label("L0-S1")
        with pytest.raises(EngineDownError, match="which tokens came before the weights changed"):
            await task

    play(story, server=FakeServer(release="0.5.18", token_s=0.001))


def test_a_refused_flush_leaves_new_weights_and_a_true_label() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        task = asyncio.create_task(client.generate(PROMPT, params(40), rid="a"))
        await server.until_tokens(3)
        await client.pause("in_place")
        await client.begin_update()
        with pytest.raises(EngineRefusedError, match="Weights were updated, but the cache was not flushed"):
            await client.update_from_handles(["YWJj"], "L0-S1", is_flushing=True)
        assert await client.label() == "L0-S1"
        await client.end_update()
        await client.resume()
        assert (await task).spans[-1].label == "L0-S1"

    play(story, server=FakeServer(token_s=0.001))


# Control


def test_information() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        info = await client.info()
        assert (info.release, info.model_path, info.architecture, info.label) == (
            "0.5.23", "/models/tiny", "Qwen3ForCausalLM", "default"
        )  # fmt: skip
        assert (info.max_request_tokens, info.max_cached_tokens) == (2042, 16384)
        assert (info.tensor_parallel_size, info.has_prefix_cache) == (1, True)
        assert client.has_version_spans
        load = await client.load()
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert 0 <= load.age_s < 3
        await client.flush_cache()

    play(story)


@STREAMING
def test_the_longest_row_may_be_all_prompt_but_one_token(has_streaming: bool) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        limit = (await client.info()).max_request_tokens
        prompt = [1] * (limit - 1)
        made = await client.generate(prompt, params(1), rid="a")
        assert made.num_prompt_tokens == limit - 1 and made.token_ids == expected_tokens(prompt, 1)
        with pytest.raises(EngineRefusedError, match=f"maximum allowed length .{limit} tokens"):
            await client.generate([*prompt, 1], params(1), rid="b")

    play(story, server=FakeServer(context_tokens=64), has_streaming=has_streaming)


def test_information_with_fields_missing() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.server_args = {
            "max_req_input_len": None, "context_length": 512, "max_total_num_tokens": None
        }  # fmt: skip
        info = await client.info()
        assert (info.max_request_tokens, info.max_cached_tokens) == (506, 506)

    play(story)


@pytest.mark.parametrize("release", ["0.5.16", "0.4.9.post1", "", "main"])
def test_an_unsupported_release_is_named(release: str) -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.server_args = {"version": release}
        with pytest.raises(EngineMismatchError, match=f"runs SGLang '{release}'; 0.5.17 or newer"):
            await client.info()

    play(story)


def test_streams_that_are_not_cumulative_are_refused() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        server.server_args = {"incremental_streaming_output": True}
        with pytest.raises(EngineMismatchError, match="--incremental-streaming-output"):
            await client.info()

    play(story)


def test_weights_from_a_directory(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    import numpy as np

    safetensors.save_file({"w": np.arange(4, dtype=np.float32)}, tmp_path / "model.safetensors")

    async def story(server: FakeServer, client: ServerClient) -> None:
        await client.update_from_disk(tmp_path, "L0-S3", is_flushing=True)
        assert await client.label() == "L0-S3"
        assert set(await client.checksums()) == {"w"}
        with pytest.raises(EngineRefusedError, match="Failed to get weights iterator"):
            await client.update_from_disk(tmp_path / "missing", "L0-S4", is_flushing=True)
        assert await client.label() == "L0-S3"

    play(story)


def test_updates_need_the_bracket_and_the_bracket_is_forgiving() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        with pytest.raises(EngineRefusedError, match="must run between"):
            await client.update_from_handles(["YWJj"], "L0-S1", is_flushing=True)
        await client.end_update()
        await client.begin_update()
        await client.begin_update()
        await client.update_from_handles(["YWJj"], "L0-S1", is_flushing=True)
        await client.end_update()

    play(story)


def test_a_flush_while_requests_run_is_refused() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        task = asyncio.create_task(client.generate(PROMPT, params(2000), rid="a"))
        await server.until_tokens(1)
        with pytest.raises(EngineRefusedError, match=r"/flush_cache answered 400: Flush cache failed\."):
            await client.flush_cache()
        await client.abort("a")
        await task

    play(story, server=FakeServer(token_s=0.001))


def test_keys_open_what_they_are_for() -> None:
    async def story(server: FakeServer, client: ServerClient) -> None:
        await client.info()
        await client.load()
        await client.generate(PROMPT, params(2), rid="a")
        await client.pause("abort")
        await client.resume()
        await client.checksums()

    play(story, server=FakeServer(api_key="secret-1", admin_key="secret-2", checksums=lambda _: {"w": "1"}))
    play(story, server=FakeServer(api_key="secret-1", checksums=lambda _: {"w": "1"}))
