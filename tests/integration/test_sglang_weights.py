"""Weights into a real SGLang server: every log-prob against a transformers forward of the model it names.

Each test starts and ends with a server that is idle, unpaused and flushed. Requests run under the namespace
of the version that the server had when they were made, as the engine makes them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sglang_world import VOCAB_SIZE, SGLangServer, tiny_model
from transformers import AutoModelForCausalLM

from cod_async.config.schema import ServerConfig
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.protocol import Generated, parse_version_label
from cod_async.engines.sglang.pushes import DiskPush, GroupPush, Push, making_label, verify
from cod_async.engines.sglang.switching import SwitchReport, switch
from cod_async.errors import EngineDownError, WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.publish import publish
from cod_async.weights.source import PublishedWeights

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]  # the first test waits for the server's start

TOLERANCE = 1e-4
WRONG = 0.1
NUM_VERSIONS = 3
LIMIT_S = 60.0
_LAYER = "model.layers.0.mlp"


@dataclass
class World:
    """The server, a client, published versions with their models, and the version that the server has."""

    client: ServerClient
    versions: list[PublishedWeights]
    models: dict[str, torch.nn.Module]
    record: Callable[[str, object], None]
    current: PublishedWeights = field(init=False)
    num_requests: int = 0

    def __post_init__(self) -> None:
        self.current = self.versions[0]

    def other(self) -> PublishedWeights:
        """A version that the server does not have."""
        return next(version for version in self.versions if version is not self.current)

    async def switch(
        self, push: Push, source: PublishedWeights, mode: str, *, is_checked: bool = True
    ) -> SwitchReport:
        report = await switch(self.client, push, source, mode, is_checked=is_checked)  # type: ignore[arg-type]
        self.current = source
        assert await self.client.label() == source.label
        self.record(f"pause_s {type(push).__name__} {mode}", round(report.pause_s, 4))
        return report

    async def generate(
        self, prompt: list[int], num_tokens: int, *, namespace: str | None = None
    ) -> Generated:
        self.num_requests += 1
        params = SamplingParams(max_tokens=num_tokens, stop_ids=frozenset())
        key = self.current.label if namespace is None else namespace
        return await self.client.generate(prompt, params, rid=f"w{self.num_requests}", namespace=key)

    async def until_running(self, num_requests: int) -> None:
        """Return once so many requests are running."""
        async with asyncio.timeout(LIMIT_S):
            while (await self.client.load()).num_running < num_requests:
                await asyncio.sleep(0.02)

    @torch.no_grad()
    def differences(self, prompt: list[int], generated: Generated) -> list[tuple[str, float]]:
        """Largest difference to the model that each span names, span by span."""
        row = torch.tensor([prompt + generated.token_ids])
        found, start = [], 0
        for span in generated.spans:
            logits = self.models[span.label](row).logits[0].float()
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            ids = row[0, len(prompt) :, None]
            expected = logprobs.gather(1, ids)[start : start + span.num_tokens, 0]
            got = torch.tensor(generated.logprobs[start : start + span.num_tokens])
            found.append((span.label, float((expected - got).abs().max())))
            start += span.num_tokens
        assert start == len(generated.token_ids)
        return found

    async def matches(self, what: str, prompt: list[int], num_tokens: int = 16) -> Generated:
        """Generate under the current version and compare."""
        generated = await self.generate(prompt, num_tokens)
        [(label, difference)] = self.differences(prompt, generated)
        self.record(f"max abs difference, {what}", f"{difference:.1e}")
        assert label == self.current.label
        assert difference <= TOLERANCE, what
        return generated


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[PublishedWeights]:
    run_dir = tmp_path_factory.mktemp("run")
    published = []
    for step in range(1, NUM_VERSIONS + 1):
        model_dir = tiny_model(run_dir / f"model-{step}", seed=100 + step)
        tensors = load_file(model_dir / "model.safetensors")
        manifest = publish(
            run_dir, "r", Version(0, step), tensors, NUM_VERSIONS, config_file=model_dir / "config.json"
        )
        published.append(PublishedWeights.open(run_dir, manifest))
    return published


@pytest.fixture(scope="module")
def models(versions: list[PublishedWeights]) -> dict[str, torch.nn.Module]:
    return {
        version.label: AutoModelForCausalLM.from_pretrained(version.folder, dtype=torch.float32).eval()
        for version in versions
    }


@pytest.fixture
def in_world(
    sglang_server: SGLangServer,
    versions: list[PublishedWeights],
    models: dict[str, torch.nn.Module],
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[[Callable[[World], Awaitable[None]]], None]]:
    """Run a story from a known state, the first version and an empty cache; leave the server's own model."""

    def record(name: str, value: object) -> None:
        record_property(name, value)
        if os.environ.get("SHOW_NUMBERS"):
            with capsys.disabled():
                print(f"\n    {name}: {value}", end="")

    def make_client() -> ServerClient:
        return ServerClient(
            sglang_server.url,
            settings=ServerConfig(control_timeout_s=20.0, update_timeout_s=20.0),
            vocab_size=VOCAB_SIZE,
            api_key=sglang_server.api_key,
            admin_key=sglang_server.admin_key,
        )

    def run(story: Callable[[World], Awaitable[None]]) -> None:
        async def told() -> None:
            client = make_client()
            world = World(client, versions, models, record)
            try:
                await switch(client, DiskPush(), versions[0], "retract", is_checked=True)
                await asyncio.wait_for(story(world), LIMIT_S)
            finally:
                await client.aclose()

        asyncio.run(told())

    yield run

    async def restore() -> None:
        client = make_client()
        try:
            await client.update_from_disk(sglang_server.model_dir, "default", is_flushing=True)
        finally:
            await client.aclose()

    asyncio.run(restore())


def prompt_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def make_push(kind: str) -> Push:
    if kind == "disk":
        return DiskPush()
    return GroupPush(bucket_bytes=64 << 10 if kind == "buckets" else 64 << 20, timeout_s=20.0, device="cpu")


InWorld = Callable[[Callable[[World], Awaitable[None]]], None]


@pytest.mark.parametrize("kind", ["disk", "group", "buckets"])
def test_an_idle_server_has_exactly_the_new_weights_after_each_kind_of_update(
    in_world: InWorld, kind: str
) -> None:
    async def story(world: World) -> None:
        push = make_push(kind)
        try:
            prompt = prompt_of(1, 40)
            await world.matches(f"{kind}, before", prompt)
            for mode in ("retract", "idle", "in_place"):
                report = await world.switch(push, world.other(), mode)
                assert 0 < report.push_s <= report.pause_s <= report.total_s
                assert report.num_paused_requests == 0
                await world.matches(f"{kind}, after {mode}", prompt)
        finally:
            await push.aclose()

    in_world(story)


@pytest.mark.parametrize("kind", ["disk", "group"])
def test_retracted_requests_match_the_model_of_each_span(in_world: InWorld, kind: str) -> None:
    async def story(world: World) -> None:
        push = make_push(kind)
        try:
            prompts = [prompt_of(seed, 10 + 17 * seed) for seed in range(4)]
            running = [asyncio.ensure_future(world.generate(prompt, 500)) for prompt in prompts]
            await world.until_running(len(running))
            old = world.current
            report = await world.switch(push, world.other(), "retract")
            assert report.num_paused_requests == len(running)
            for prompt, generated in zip(prompts, await asyncio.gather(*running), strict=True):
                assert generated.num_retractions == 1
                assert [span.label for span in generated.spans] == [old.label, world.current.label]
                for label, difference in world.differences(prompt, generated):
                    world.record(f"{kind}, retract in flight, span of {label}", f"{difference:.1e}")
                    assert difference <= TOLERANCE
            await world.matches(f"{kind}, after retract in flight", prompts[1])
        finally:
            await push.aclose()

    in_world(story)


@pytest.mark.parametrize("kind", ["disk", "group"])
def test_in_place_keeps_requests_and_biases_only_their_new_span(in_world: InWorld, kind: str) -> None:
    async def story(world: World) -> None:
        push = make_push(kind)
        try:
            prompt = prompt_of(7, 60)
            running = asyncio.ensure_future(world.generate(prompt, 500))
            await world.until_running(1)
            await world.switch(push, world.other(), "in_place")
            # Nothing was flushed, and the old request still runs on its old blocks.
            await world.matches(f"{kind}, beside a request that went on in place", prompt)
            generated = await running
            assert generated.num_retractions == 0
            (_, old), (label, new) = world.differences(prompt, generated)
            assert label == world.current.label
            assert old <= TOLERANCE
            world.record(f"{kind}, in place, old span", f"{old:.1e}")
            world.record(f"{kind}, in place, new span (bias)", f"{new:.2f}")
            # Later requests meet none of the blocks that it wrote, before or after the switch.
            whole = prompt + generated.token_ids
            again = await world.matches(f"{kind}, the same row under the new version", whole)
            assert again.num_cached_tokens <= len(prompt)  # of the request beside it, which was all new
            fresh = prompt_of(8, 50)
            assert (await world.matches("fresh", fresh)).num_cached_tokens == 0
        finally:
            await push.aclose()

    in_world(story)


def test_blocks_written_across_a_switch_are_never_reused(in_world: InWorld) -> None:
    async def story(world: World) -> None:
        prompt, old = prompt_of(9, 60), world.current
        running = asyncio.ensure_future(world.generate(prompt, 500))
        await world.until_running(1)
        await world.switch(DiskPush(), world.other(), "in_place")
        generated = await running
        assert [span.label for span in generated.spans] == [old.label, world.current.label]
        whole = prompt + generated.token_ids
        first = await world.matches("whole row after the switch", whole)
        assert first.num_cached_tokens == 0
        second = await world.matches("whole row, second time", whole)
        assert second.num_cached_tokens >= len(whole) - 1
        # The blocks are there, and wrong: under the old namespace they are found.
        stale = await world.generate(whole, 16, namespace=old.label)
        assert stale.num_cached_tokens > len(prompt)
        assert world.differences(whole, stale)[0][1] > WRONG

    in_world(story)


@pytest.mark.parametrize("kind", ["disk", "group"])
def test_two_versions_live_in_the_cache_without_a_flush(in_world: InWorld, kind: str) -> None:
    """What ``wait`` and ``at_segment_boundary`` do to a server: an idle switch, nothing dropped."""

    async def story(world: World) -> None:
        push = make_push(kind)
        try:
            prompt, bare = prompt_of(11, 80), prompt_of(12, 80)
            first, second = world.versions[0], world.versions[1]
            assert (await world.matches("V1", prompt)).num_cached_tokens == 0
            assert (await world.matches("V1 again", prompt)).num_cached_tokens > 0
            await world.generate(bare, 16, namespace="")
            await world.switch(push, second, "idle")
            assert (await world.matches(f"{kind}, V2 without a flush", prompt)).num_cached_tokens == 0
            assert (await world.matches(f"{kind}, V2 again, cached", prompt)).num_cached_tokens > 0
            # Without a namespace the old blocks are served, and the log-probs are those of no model.
            wrong = await world.generate(bare, 16, namespace="")
            assert wrong.num_cached_tokens > 0
            [(_, difference)] = world.differences(bare, wrong)
            world.record(f"{kind}, without namespace", f"{difference:.2f}")
            assert difference > WRONG
            # Back to the first version: its blocks are still there, and still right.
            await world.switch(push, first, "idle")
            assert (await world.matches(f"{kind}, V1 once more, cached", prompt)).num_cached_tokens > 0
        finally:
            await push.aclose()

    in_world(story)


def test_a_folder_without_weights_changes_nothing(in_world: InWorld, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        had, other = world.current, world.other()
        empty = PublishedWeights(other.manifest, tmp_path, other.config, other.tensors())
        running = asyncio.ensure_future(world.generate(prompt_of(3, 30), 400))
        await world.until_running(1)
        with pytest.raises(WeightsError, match="did not switch to") as caught:
            await world.switch(DiskPush(), empty, "retract")
        assert caught.value.label == had.label
        generated = await running
        assert [span.label for span in generated.spans] == [had.label]
        assert world.differences(prompt_of(3, 30), generated)[0][1] <= TOLERANCE
        await verify(world.client, had)

    in_world(story)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("renamed", "only L0-S. has a parameter model.layers.0.mlp.dawn_proj.weight"),
        ("reshaped", "Failed to update parameter online"),
        ("altered", "parameter model.norm.weight has checksum"),
    ],
)
def test_wrong_tensors_are_found_and_the_server_goes_on(in_world: InWorld, damage: str, said: str) -> None:
    async def story(world: World) -> None:
        other = world.other()
        tensors = dict(other.tensors())
        good = other
        name = "model.norm.weight"
        if damage == "renamed":
            tensors[f"{_LAYER}.dawn_proj.weight"] = tensors.pop(f"{_LAYER}.down_proj.weight")
        elif damage == "reshaped":
            tensors[name] = tensors[name][:5].clone()
        else:
            tensors[name] = tensors[name] + 1
        wrong = PublishedWeights(other.manifest, other.folder, other.config, tensors)
        push = make_push("buckets")
        if damage == "altered":
            push = _Swapped(push, wrong)  # the way in is broken, the version is not
            wrong = good
        try:
            with pytest.raises(WeightsError, match=said) as caught:
                await world.switch(push, wrong, "retract")
            label = caught.value.label
            assert label == (making_label(good.label) if damage == "reshaped" else good.label)
            assert damage != "reshaped" or parse_version_label(label or "") is None
            push = make_push("group")
            await world.switch(push, good, "retract")
            await world.matches("after wrong tensors", prompt_of(4, 30))
        finally:
            await push.aclose()

    in_world(story)


class _Swapped:
    """A way in that brings other weights than it was given."""

    is_bracketed = True

    def __init__(self, push: Push, instead: PublishedWeights) -> None:
        self._push, self._instead = push, instead

    async def prepare(self, client: ServerClient) -> None:
        await self._push.prepare(client)

    async def push(self, client: ServerClient, source: PublishedWeights, *, is_flushing: bool) -> None:
        await self._push.push(client, self._instead, is_flushing=is_flushing)

    async def aclose(self) -> None:
        await self._push.aclose()


def test_an_update_that_is_cancelled_leaves_a_server_that_runs(in_world: InWorld) -> None:
    async def story(world: World) -> None:
        push = GroupPush(bucket_bytes=1 << 10, timeout_s=20.0, device="cpu")
        try:
            other = world.other()
            await push.prepare(world.client)
            updating = asyncio.ensure_future(world.switch(push, other, "retract"))
            async with asyncio.timeout(LIMIT_S):
                while await world.client.label() != making_label(other.label):
                    await asyncio.sleep(0)
            updating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await updating
            assert not push.is_open
            # It generates: half-made weights, under a label that is no version's.
            generated = await world.generate(prompt_of(5, 30), 8)
            assert [parse_version_label(span.label) for span in generated.spans] == [None]
            await world.switch(push, other, "retract")
            await world.matches("after a cancelled update", prompt_of(5, 30))
        finally:
            await push.aclose()

    in_world(story)


def test_a_server_that_left_the_group_is_met_again(in_world: InWorld) -> None:
    async def story(world: World) -> None:
        push = GroupPush(bucket_bytes=64 << 20, timeout_s=20.0, device="cpu")
        try:
            await world.switch(push, world.other(), "idle")
            had, other = world.current, world.other()
            assert push._group is not None
            await world.client.close_group(push._group.name)
            with pytest.raises((WeightsError, EngineDownError)) as caught:
                await world.switch(push, other, "retract")
            assert getattr(caught.value, "label", None) == making_label(other.label)
            await verify(world.client, had)
            await world.switch(push, other, "retract")
            await world.matches("after meeting again", prompt_of(6, 30))
        finally:
            await push.aclose()

    in_world(story)


def test_a_version_of_another_dtype_and_run_is_checked_in_the_servers_dtype(
    in_world: InWorld, tmp_path: Path
) -> None:
    async def story(world: World) -> None:
        source = world.versions[1]
        halved = {name: tensor.to(torch.bfloat16) for name, tensor in source.tensors().items()}
        manifest = publish(tmp_path, "r", Version(0, 9), halved, 2, config_file=source.folder / "config.json")
        opened = PublishedWeights.open(tmp_path, manifest)
        await switch(world.client, DiskPush(), opened, "retract", is_checked=True)
        exact = replace_tensors(opened, {name: tensor.float() for name, tensor in halved.items()})
        await verify(world.client, exact)
        with pytest.raises(WeightsError, match="has checksum"):
            await verify(world.client, source)

    in_world(story)


def replace_tensors(source: PublishedWeights, tensors: dict[str, torch.Tensor]) -> PublishedWeights:
    return PublishedWeights(source.manifest, source.folder, source.config, tensors)
