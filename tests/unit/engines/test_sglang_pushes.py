"""Ways into a server: a real gloo group with a peer in the same process, and CUDA handles as far as a CPU
goes.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from aiohttp import web
from fake_sglang import FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import reductions

from cod_async.config.schema import ServerConfig, WeightsConfig
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.pushes import (
    DiskPush,
    GroupPush,
    IpcPush,
    making_label,
    push_for,
)
from cod_async.engines.sglang.pushes.base import buckets
from cod_async.engines.sglang.pushes.group import _local_address
from cod_async.engines.sglang.pushes.ipc import is_loopback, reduced, serialized_handles
from cod_async.errors import (
    EngineDownError,
    EngineError,
    EngineMismatchError,
    EngineRefusedError,
)
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest
from cod_async.weights.source import PublishedWeights

SCENARIO_S = 40.0
DISTRIBUTED = "/update_weights_from_distributed"


def source_of(tensors: dict[str, torch.Tensor]) -> PublishedWeights:
    manifest = Manifest(run="r", version=Version(0, 1), digest="", shards=())
    return PublishedWeights(manifest, Path("/nowhere"), {}, tensors)


def odd_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "half": torch.randn(33, generator=generator).to(torch.bfloat16),
        "turned": torch.randn(6, 4, generator=generator).t(),
        "large": torch.randn(5000, generator=generator),
        "one": torch.tensor(2.5),
        "z": torch.arange(12.0).reshape(3, 2, 2),
    }


# The group


class GroupServer(FakeServer):
    """A fake server that joins groups as the real one does, and keeps what it receives.

    Attributes:
        behavior: ``receive``; ``refuse`` before receiving; ``stall`` without receiving; ``leave`` the group
            instead; and at the opening ``never join``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.behavior = "receive"
        self.received: dict[str, torch.Tensor] = {}
        self.members: dict[str, Any] = {}

    async def _init_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.behavior == "never join":
            await asyncio.Event().wait()
        self.members[body["group_name"]] = await asyncio.to_thread(self._join, body)
        return await super()._init_group(request)

    @staticmethod
    def _join(body: dict[str, Any]) -> Any:
        classes: Any = torch._C._distributed_c10d
        timeout = timedelta(seconds=20)
        store = classes.TCPStore(
            body["master_address"], body["master_port"], body["world_size"], False, timeout
        )
        for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
            store = classes.PrefixStore(prefix, store)
        options = classes.ProcessGroupGloo._Options()
        options._devices = [classes.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        return classes.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], options), store

    async def _update_from_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.behavior == "refuse":
            return web.json_response({"success": False, "message": "no such parameter"}, status=400)
        if self.behavior == "leave":
            self.members.clear()
            await asyncio.Event().wait()
        if self.behavior == "stall":
            await asyncio.Event().wait()
        member, _ = self.members[body["group_name"]]
        await asyncio.to_thread(self._receive, member, body)
        return await super()._update_from_group(request)

    def _receive(self, member: Any, body: dict[str, Any]) -> None:
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            options = dist.BroadcastOptions()
            options.rootRank = options.rootTensor = 0
            member.broadcast([tensor], options).wait()
            self.received[name] = tensor


GroupStory = Callable[[GroupServer, ServerClient], Awaitable[None]]


def play(story: GroupStory) -> None:
    async def told() -> None:
        async with asyncio.timeout(SCENARIO_S), GroupServer() as server:
            assert isinstance(server, GroupServer)
            client = ServerClient(server.url, settings=ServerConfig(), vocab_size=320)
            try:
                await client.begin_update()
                await story(server, client)
            finally:
                await client.aclose()
                server.members.clear()

    asyncio.run(told())


def test_all_tensors_arrive_exactly_in_buckets_and_the_group_stays_open() -> None:
    async def story(server: GroupServer, client: ServerClient) -> None:
        push = GroupPush(bucket_bytes=400, timeout_s=20.0, device="cpu")
        tensors = odd_tensors()
        for is_flushing in (True, False):
            server.received.clear()
            await push.push(client, source_of(tensors), is_flushing=is_flushing)
            assert server.received.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(server.received[name], tensor)
                assert server.received[name].dtype == tensor.dtype
            assert server.label == "L0-S1"
        bodies = server.bodies(DISTRIBUTED)
        assert [body["names"] for body in bodies[:3]] == [["a", "half", "turned"], ["large"], ["one", "z"]]
        making = making_label("L0-S1")
        assert [body["weight_version"] for body in bodies] == [making, making, "L0-S1"] * 2
        assert [body["flush_cache"] for body in bodies] == [False, False, True, False, False, False]
        assert server.paths().count("/init_weights_update_group") == 1
        await push.aclose()
        assert not push.is_open
        assert server.groups == {}
        assert not dist.is_initialized()

    play(story)


def test_a_refusal_is_the_servers_word_and_the_next_update_meets_anew() -> None:
    async def story(server: GroupServer, client: ServerClient) -> None:
        push = GroupPush(bucket_bytes=1 << 20, timeout_s=20.0, device="cpu")
        server.behavior = "refuse"
        large = {"large": torch.zeros(8 << 20)}
        with pytest.raises(EngineRefusedError, match="no such parameter"):
            await push.push(client, source_of(large), is_flushing=False)
        assert not push.is_open
        assert server.label == making_label("L0-S1")
        server.behavior = "receive"
        await push.push(client, source_of(odd_tensors()), is_flushing=False)
        assert server.label == "L0-S1"
        first, second = (body["group_name"] for body in server.bodies("/init_weights_update_group"))
        assert first != second
        assert server.bodies("/destroy_weights_update_group") == [{"group_name": first}]
        await push.aclose()

    play(story)


@pytest.mark.parametrize(
    ("behavior", "said"), [("stall", "were not taken within 1 s"), ("leave", "the process group broke")]
)
def test_a_peer_that_stalls_or_leaves_is_an_error_with_its_cause(behavior: str, said: str) -> None:
    async def story(server: GroupServer, client: ServerClient) -> None:
        push = GroupPush(bucket_bytes=1 << 20, timeout_s=1.0, device="cpu")
        await push.prepare(client)
        server.behavior = behavior
        with pytest.raises(EngineDownError, match=said):
            await push.push(client, source_of({"large": torch.zeros(8 << 20)}), is_flushing=False)
        assert not push.is_open
        server.behavior = "receive"
        await push.push(client, source_of(odd_tensors()), is_flushing=False)
        assert server.label == "L0-S1"
        await push.aclose()

    play(story)


def test_a_server_that_never_joins_is_an_error_with_its_cause() -> None:
    async def story(server: GroupServer, client: ServerClient) -> None:
        push = GroupPush(bucket_bytes=1 << 20, timeout_s=0.5, device="cpu")
        server.behavior = "never join"
        with pytest.raises(EngineDownError, match=r"no gloo process group of 2 ranks at 127\.0\.0\.1:"):
            await push.prepare(client)
        assert server.label == "default"  # nothing was touched
        await push.aclose()

    play(story)


def test_a_server_that_refuses_to_join_is_not_waited_for() -> None:
    async def story(server: GroupServer, client: ServerClient) -> None:
        push = GroupPush(bucket_bytes=1 << 20, timeout_s=3000.0, device="cpu")
        server.faults.statuses["/init_weights_update_group"] = [400]
        with pytest.raises(EngineRefusedError):
            await push.prepare(client)

    play(story)


def test_a_cancelled_update_drops_the_group_at_once() -> None:
    async def story(server: GroupServer, client: ServerClient) -> None:
        push = GroupPush(bucket_bytes=1 << 20, timeout_s=3000.0, device="cpu")
        await push.prepare(client)
        server.behavior = "stall"
        source = source_of({"large": torch.zeros(8 << 20)})
        pushing = asyncio.ensure_future(push.push(client, source, is_flushing=False))
        await server.until(lambda: DISTRIBUTED in server.paths())
        pushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pushing
        assert not push.is_open

    play(story)


STUCK = """
import asyncio, sys
from pathlib import Path
import torch
from cod_async.config.schema import ServerConfig
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.pushes import GroupPush
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest
from cod_async.weights.source import PublishedWeights

async def told():
    client = ServerClient(sys.argv[1], settings=ServerConfig(), vocab_size=320)
    push = GroupPush(bucket_bytes=1 << 20, timeout_s=3000.0, device="cpu")
    await push.prepare(client)
    manifest = Manifest(run="r", version=Version(0, 1), digest="", shards=())
    source = PublishedWeights(manifest, Path("."), {}, {"large": torch.zeros(8 << 20)})
    try:
        async with asyncio.timeout(1.0):
            await push.push(client, source, is_flushing=False)
    except TimeoutError:
        print("given up", flush=True)
    await push.aclose()
    await client.aclose()

asyncio.run(told())
"""


def test_a_stuck_broadcast_keeps_neither_the_loop_nor_the_process() -> None:
    async def story(server: GroupServer, client: ServerClient) -> None:
        server.behavior = "stall"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "ignore", "-c", STUCK, server.url, stdout=subprocess.PIPE
        )
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert output == b"given up\n"
        assert process.returncode == 0
        assert server.members  # the peer was there all the time, and received nothing

    play(story)


@given(
    sizes=st.lists(st.integers(0, 50), max_size=20),
    bucket_bytes=st.integers(1, 300),
)
@settings(max_examples=100, deadline=None)
def test_buckets_keep_the_order_and_the_limit(sizes: list[int], bucket_bytes: int) -> None:
    tensors = {f"t{number}": torch.zeros(size) for number, size in enumerate(sizes)}
    made = list(buckets(tensors, bucket_bytes))
    assert [name for bucket in made for name, _ in bucket] == list(tensors)
    for bucket in made:
        assert bucket
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= bucket_bytes
    for one, other in pairwise(made):
        assert sum(tensor.nbytes for _, tensor in [*one, other[0]]) > bucket_bytes


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:30000", "127.0.0.1"),
        ("http://127.0.0.7:30000", "127.0.0.7"),
        ("http://localhost:30000", "127.0.0.1"),
        ("http://[::1]:30000", "::1"),
    ],
)
def test_a_server_on_this_host_is_met_on_loopback(url: str, address: str) -> None:
    assert _local_address(url) == address


def test_the_configured_push_is_made() -> None:
    kinds = {"disk": DiskPush, "group": GroupPush, "ipc": IpcPush}
    for name, kind in kinds.items():
        push = push_for(WeightsConfig(into_engine=name), ServerConfig())  # type: ignore[arg-type]
        assert type(push) is kind
        assert push.is_bracketed is (name != "disk")


# CUDA memory


@pytest.mark.parametrize(
    ("url", "is_so"),
    [
        ("http://127.0.0.1:1", True),
        ("http://localhost:1", True),
        ("http://[::1]:1", True),
        ("http://10.0.0.5:1", False),
        ("http://127.0.0.1.example.org:1", False),
        ("http://localhost.example.org:1", False),
        ("http://127.0.0.1@example.org:1", False),
    ],
)
def test_loopback_is_recognized(url: str, is_so: bool) -> None:
    assert is_loopback(url) is is_so


def test_cpu_tensors_are_refused_by_name() -> None:
    with pytest.raises(EngineError, match=r"tensor model\.norm\.weight is in cpu memory"):
        serialized_handles([("model.norm.weight", torch.ones(3))])


def test_the_gpu_is_named_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.Tensor, (3,), (1,), 0, "storage", torch.float32, 5, b"handle", 12, 0, False)

    class Properties:
        uuid = "GPU-5"

    monkeypatch.setattr(reductions, "reduce_tensor", lambda _: (reductions.rebuild_cuda_tensor, arguments))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties if index == 5 else None)
    rebuild, found = reduced(torch.ones(3))
    assert rebuild is reductions.rebuild_cuda_tensor
    assert found == (*arguments[:6], "GPU-5", *arguments[7:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("url", "said"),
    [("http://127.0.0.1:9", "sees no GPU"), ("http://10.0.0.5:9", "only be handed over on this")],
)
def test_handing_over_where_it_cannot_work_is_said_before_anything_is_asked(url: str, said: str) -> None:
    async def told() -> None:
        client = ServerClient(url, settings=ServerConfig(), vocab_size=320)
        try:
            with pytest.raises(EngineMismatchError, match=said):
                await IpcPush(bucket_bytes=1 << 20).prepare(client)
        finally:
            await client.aclose()

    asyncio.run(told())
