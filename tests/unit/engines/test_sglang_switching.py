"""A switch of one server's weights, against a server with the real semantics: whatever fails, it resumes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from fake_sglang import FakeServer
from safetensors.torch import load_file

from cod_async.config.schema import ServerConfig
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang import switching
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.pushes import DiskPush, making_label
from cod_async.engines.sglang.switching import SwitchMode, switch
from cod_async.errors import EngineDownError, EngineMismatchError, WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.publish import publish
from cod_async.weights.source import PublishedWeights

SCENARIO_S = 30.0
PAUSE, RESUME = "/pause_generation", "/continue_generation"
DISK, HANDLES = "/update_weights_from_disk", "/update_weights_from_tensor"
BEGIN, END = "/begin_weight_update", "/end_weight_update"
CHECK, FLUSH = "/weights_checker", "/flush_cache"
CHANGES = frozenset({PAUSE, RESUME, DISK, HANDLES, BEGIN, END, CHECK, FLUSH, "/update_weight_version"})
OLD, NEW = "L0-S0", "L0-S1"

Story = Callable[[FakeServer, ServerClient, PublishedWeights], Awaitable[None]]


def fused_checksums(folder: Path) -> dict[str, str]:
    """What the real server reports for a tied Qwen3 of 64 rows, said once more in another way."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        parts = [tensors.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        tensors[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    for name in [name for name in tensors if name.endswith("gate_proj.weight")]:
        parts = [tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))]
        tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for name, tensor in tensors.items()
    }


def published(root: Path, step: int) -> PublishedWeights:
    generator = torch.Generator().manual_seed(step)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (64, 8),
        f"{layer}self_attn.q_proj.weight": (16, 8),
        f"{layer}self_attn.k_proj.weight": (4, 8),
        f"{layer}self_attn.v_proj.weight": (4, 8),
        f"{layer}mlp.gate_proj.weight": (12, 8),
        f"{layer}mlp.up_proj.weight": (12, 8),
        "model.norm.weight": (8,),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = root / "config.json"
    config.write_text('{"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": true}')
    return PublishedWeights.open(root, publish(root, "r", Version(0, step), tensors, 9, config_file=config))


class HandlesPush:
    """A way in between begin and end, which waits where it is told to."""

    is_bracketed = True

    def __init__(self) -> None:
        self.is_inside = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.error: Exception | None = None

    async def prepare(self, client: ServerClient) -> None:
        """Nothing to prepare."""

    async def push(self, client: ServerClient, source: PublishedWeights, *, is_flushing: bool) -> None:
        self.is_inside.set()
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        text = base64.b64encode(source.label.encode()).decode()
        await client.update_from_handles([text], source.label, is_flushing=is_flushing)

    async def aclose(self) -> None:
        """Nothing to let go of."""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a story with a server that has version 0, its client, and version 1."""
    monkeypatch.setattr(switching, "RESUME_WAITS_S", (0.0, 0.0))

    def run(story: Story, **settings: float) -> None:
        async def told() -> None:
            first, second = published(tmp_path, 0), published(tmp_path, 1)
            server = FakeServer(model_dir=first.folder, checksums=fused_checksums)
            server.label = server.scheduler_label = OLD
            async with asyncio.timeout(SCENARIO_S), server:
                client = ServerClient(server.url, settings=ServerConfig(**settings), vocab_size=320)  # type: ignore[arg-type]
                try:
                    await story(server, client, second)
                finally:
                    await client.aclose()

        asyncio.run(told())

    return run


def changes(server: FakeServer) -> list[str]:
    """The calls that change something, in their order."""
    return [path for path in server.paths() if path in CHANGES]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_switch_pauses_updates_checks_and_resumes(play: Callable[..., None], mode: SwitchMode) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        report = await switch(client, DiskPush(), source, mode, is_checked=True)
        assert changes(server) == [PAUSE, DISK, CHECK, RESUME]
        assert server.bodies(PAUSE) == [{"mode": mode}]
        [update] = server.bodies(DISK)
        assert update["flush_cache"] is (mode == "retract")
        assert (update["model_path"], update["weight_version"]) == (str(source.folder), NEW)
        assert (report.version, report.mode, report.num_paused_requests) == (Version(0, 1), mode, 0)
        assert 0 < report.push_s < report.pause_s < report.total_s
        assert not server.is_paused

    play(story)


def test_an_idle_switch_neither_pauses_nor_flushes(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        report = await switch(client, DiskPush(), source, "idle", is_checked=False)
        assert changes(server) == [DISK]
        assert server.bodies(DISK)[0]["flush_cache"] is False
        assert report.push_s <= report.pause_s
        assert server.label == NEW

    play(story)


def test_a_bracketed_update_is_ended_before_it_is_checked(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        await switch(client, HandlesPush(), source, "retract", is_checked=False)
        assert changes(server) == [PAUSE, BEGIN, HANDLES, END, RESUME]
        assert not server.is_update_open

    play(story)


def test_running_requests_are_counted_and_go_on(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.token_s = 0.02  # many times longer than the switch takes
        params = SamplingParams(max_tokens=60, stop_ids=frozenset())
        running = [
            asyncio.ensure_future(client.generate([number], params, rid=f"{number}")) for number in (1, 2)
        ]
        await server.until_tokens(3)
        report = await switch(client, DiskPush(), source, "retract", is_checked=True)
        assert report.num_paused_requests == 2
        for generated in await asyncio.gather(*running):
            assert [span.label for span in generated.spans] == [OLD, NEW]
            assert (len(generated.token_ids), generated.num_retractions) == (60, 1)

    play(story)


def test_a_refused_update_leaves_a_server_that_runs(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.faults.update_message = "Failed to get weights iterator: no such folder"
        with pytest.raises(WeightsError, match=f"did not switch to {NEW}.*no such folder") as caught:
            await switch(client, DiskPush(), source, "retract", is_checked=True)
        assert caught.value.label == OLD
        assert changes(server) == [PAUSE, DISK, RESUME]
        server.faults.update_message = ""
        await switch(client, DiskPush(), source, "retract", is_checked=True)
        assert server.label == NEW

    play(story)


def test_a_load_that_broke_off_has_a_label_that_says_so(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.faults.update_message = (
            "Failed to update weights: bad tensor. Rolling back to original weights."
        )
        with pytest.raises(WeightsError, match="Rolling back") as caught:
            await switch(client, DiskPush(), source, "in_place", is_checked=True)
        assert caught.value.label == making_label(NEW)
        assert changes(server)[-1] == RESUME

    play(story)


@pytest.mark.parametrize("status", [500, 400])
def test_a_pause_that_fails_is_taken_back(play: Callable[..., None], status: int) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.faults.statuses[PAUSE] = [status]
        with pytest.raises((EngineDownError, WeightsError)) as caught:
            await switch(client, DiskPush(), source, "retract", is_checked=False)
        assert getattr(caught.value, "label", None) == OLD
        assert changes(server) == [PAUSE, RESUME]

    play(story)


def test_a_wrong_key_is_fatal_and_said_as_such(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.admin_key = "another"
        with pytest.raises(EngineMismatchError):
            await switch(client, DiskPush(), source, "retract", is_checked=False)

    play(story)


@pytest.mark.parametrize("path", [PAUSE, DISK, CHECK])
def test_a_step_that_hangs_ends_at_its_deadline(play: Callable[..., None], path: str) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.faults.hung_paths.add(path)
        with pytest.raises(EngineDownError) as caught:
            await switch(client, DiskPush(), source, "retract", is_checked=True)
        assert caught.value.label == (NEW if path == CHECK else OLD)
        assert changes(server)[-1] == RESUME
        assert not server.is_paused

    play(story, control_timeout_s=0.3, update_timeout_s=0.3)


def test_a_resume_that_fails_is_asked_again(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.faults.statuses[RESUME] = [500, 500]
        await switch(client, DiskPush(), source, "retract", is_checked=False)
        assert changes(server) == [PAUSE, DISK, RESUME, RESUME, RESUME]
        assert not server.is_paused

    play(story)


def test_a_server_that_never_resumes_is_down_though_it_has_the_weights(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.faults.statuses[RESUME] = [500] * 9
        with pytest.raises(EngineDownError, match="does not resume") as caught:
            await switch(client, DiskPush(), source, "retract", is_checked=False)
        assert caught.value.label == NEW

    play(story)


def test_a_server_that_is_gone_has_no_label(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        await server.stop_listening()
        with pytest.raises(EngineDownError) as caught:
            await switch(client, DiskPush(), source, "retract", is_checked=True)
        assert caught.value.label is None

    play(story)


def test_wrong_bytes_are_found_by_name_and_the_server_resumes(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        def torn(folder: Path) -> dict[str, str]:
            return fused_checksums(folder) | {"model.layers.0.self_attn.qkv_proj.weight": "0" * 16}

        server.checksums = torn
        with pytest.raises(WeightsError, match=r"qkv_proj\.weight has checksum 0000000000000000") as caught:
            await switch(client, DiskPush(), source, "in_place", is_checked=True)
        assert caught.value.label == NEW
        assert changes(server) == [PAUSE, DISK, CHECK, RESUME]

    play(story)


def test_new_weights_without_their_flush_are_flushed_before_anything_runs(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.faults.is_flush_refused = True
        server.checksums = lambda _: fused_checksums(source.folder)
        await switch(client, DiskPush(), source, "retract", is_checked=True)
        assert [path for path in changes(server) if path != "/update_weight_version"] == [
            PAUSE,
            DISK,
            FLUSH,
            CHECK,
            RESUME,
        ]
        assert server.label == NEW

    play(story)


def test_new_weights_that_cannot_be_flushed_are_said_to_be_new(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        server.faults.is_flush_refused = True
        server.faults.statuses[FLUSH] = [400]
        with pytest.raises(WeightsError) as caught:
            await switch(client, DiskPush(), source, "retract", is_checked=True)
        assert caught.value.label == NEW
        assert changes(server)[-1] == RESUME

    play(story)


@pytest.mark.parametrize("mode", ["retract", "idle"])
def test_a_cancelled_switch_ends_the_update_and_resumes(play: Callable[..., None], mode: SwitchMode) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        push = HandlesPush()
        push.go_on.clear()
        switching_ = asyncio.ensure_future(switch(client, push, source, mode, is_checked=False))
        await push.is_inside.wait()
        switching_.cancel()
        with pytest.raises(asyncio.CancelledError):
            await switching_
        assert changes(server) == ([BEGIN, END] if mode == "idle" else [PAUSE, BEGIN, END, RESUME])
        assert not server.is_paused and not server.is_update_open

    play(story)


def test_cancelling_again_and_again_does_not_stop_the_resume(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        push = HandlesPush()
        push.go_on.clear()
        running = asyncio.ensure_future(switch(client, push, source, "retract", is_checked=False))
        await push.is_inside.wait()
        while not running.done():
            running.cancel()
            await asyncio.sleep(0)
        assert running.cancelled()
        assert changes(server)[-2:] == [END, RESUME]
        assert not server.is_paused

    play(story)


def test_a_cancelled_switch_of_a_server_that_is_gone_is_still_cancelled(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        push = HandlesPush()
        push.go_on.clear()
        switching_ = asyncio.ensure_future(switch(client, push, source, "retract", is_checked=False))
        await push.is_inside.wait()
        server.faults.is_hung = True
        switching_.cancel()
        await asyncio.wait([switching_])
        assert switching_.cancelled()  # and not failed because nobody answers the resume

    play(story, control_timeout_s=0.1, update_timeout_s=0.1)


def test_any_other_error_of_a_push_also_resumes(play: Callable[..., None]) -> None:
    async def story(server: FakeServer, client: ServerClient, source: PublishedWeights) -> None:
        push = HandlesPush()
        push.error = ZeroDivisionError("a bug")
        with pytest.raises(ZeroDivisionError):
            await switch(client, push, source, "retract", is_checked=False)
        assert changes(server) == [PAUSE, BEGIN, END, RESUME]

    play(story)
