"""Throughput of the real link: acknowledged segments per second, with and without commit.

Two processes: this one is the coordinator, a child is an actor (ClientLink, its I/O thread and a sender).
Both modes run in turn, several rounds in one call, so that a busy machine hurts both alike; medians and their
ratio are reported, and the CPU time per segment, which a busy machine changes least.

*With commit* this process is the coordinator's own loop (:class:`cod_async.coordinator.service.Service`):
poll, validate, the lease's rules, insert, one commit (``synchronous = FULL``), and only then the
acknowledgements, the metrics file included. Only the leases are not asked for: they are in the database when
the run starts, one lifecycle for each segment, so that no group ever closes. *Without commit* the same link
decodes, checks and acknowledges at once.

Usage: ``python -m bench.wire.throughput [--segments N] [--rounds R] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import msgspec
import numpy as np
import zmq
from msgspec.structs import replace

from cod_async.config.schema import Config, StoreConfig, TransportConfig
from cod_async.coordinator.service import BURST_S, Service
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import (
    LifecycleState,
    PendingUpdate,
    Row,
    Segment,
    SegmentKey,
    Version,
    VersionSpan,
)
from cod_async.store.database import RunStore
from cod_async.store.schema import DATABASE_NAME
from cod_async.store.work import NewGroup
from cod_async.transport.client_link import ClientLink
from cod_async.transport.server_link import ServerLink
from cod_async.weights.manifest import Manifest
from cod_async.wire.codec import encode_segment
from cod_async.wire.messages import Bye, SegmentData
from cod_async.wire.session import Received

RUN = "bench"
PACK_SIZE, GROUP_SIZE = 4, 8
GOAL_PER_S, GOAL_FRAC = 5000.0, 0.70
VERSION = Version(0, 3)


def make_segments(count: int, num_tokens: int) -> list[Segment]:
    """Make solve segments with distinct keys; arrays are shared, so that only the link is measured."""
    num_actions = num_tokens // 2
    row = Row(
        token_ids=Array.of(np.arange(num_tokens) % 500, "<i4"),
        action_spans=((num_tokens - num_actions, num_tokens),),
        behavior_logprobs=Array.of(-np.linspace(0, 4, num_actions), "<f4"),
        versions=(VersionSpan(VERSION, num_actions),),
    )
    state = LifecycleState(1, "red goes up", (1.0,), PendingUpdate("I pressed red.", 1.0, "You did it."))
    first = Segment(
        RUN, SegmentKey(0, 0, 0), 0, "actor-0", "hidden_buttons", "cross", 7, "solve", 0, (row,), 1.0, 1.0,
        "success", False, state, {"num_steps": 2.0},
    )  # fmt: skip
    keys = (SegmentKey(index // GROUP_SIZE, index % GROUP_SIZE, 0) for index in range(count))
    return [replace(first, key=key) for key in keys]


def run_client(address: str, count: int, num_tokens: int) -> None:
    """Send, wait for the last acknowledgement, print the seconds from the first send to the last ack."""
    segments = make_segments(count, num_tokens)
    link = ClientLink(lambda: address, "actor", "actor-0", RUN, TransportConfig())
    link.start()
    if not link.wait_connected(30):
        raise SystemExit("no connection")
    began, cpu_began = time.perf_counter(), time.process_time()
    ids = [link.send_segment(segment) for segment in segments]
    for outbox_id in ids:
        link.wait_acked(outbox_id)
    report = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}
    print(json.dumps(report | {"num_resent": link.num_resent}))
    link.close(Bye())


def make_run(folder: Path, count: int) -> Config:
    """Make a run folder whose leases are all held by the first actor that says Hello."""
    config = msgspec.convert(
        {
            "environments": [{"name": "hidden_buttons", "preset": "cross"}],
            "run": {"name": RUN, "num_steps": 1_000_000},
            "lifecycle": {"pack_size": PACK_SIZE, "group_size": GROUP_SIZE},
            "model": {"max_context_tokens": 65536},
        },
        Config,
    )
    group = NewGroup(
        environment="hidden_buttons", preset="cross", options_json="{}", records_json=("{}",) * PACK_SIZE,
        pack_seed=7, num_members=GROUP_SIZE, planned_at=Version(0, 0),
    )  # fmt: skip
    store = RunStore(folder)
    with store.transaction():
        store.history.open_lineage(None, 0, "bench", 0)
        store.history.add_version(Manifest(RUN, VERSION, "0" * 64, ()))
        for index in range(-(-count // GROUP_SIZE)):
            store.work.add_group(index, group)
    store.close()
    with contextlib.closing(sqlite3.connect(folder / DATABASE_NAME)) as connection, connection:
        connection.execute("UPDATE leases SET state = 'held', session = 1, granted_at = 0")
        connection.execute("UPDATE groups SET floor_lineage = 0, floor_step = 3")
    return config


def acknowledge(link: ServerLink, count: int) -> int:
    """Take ``count`` segments and acknowledge them at once; return the number of batches."""
    config = StoreConfig()
    num_settled = num_batches = 0
    while num_settled < count:
        until = time.monotonic() + config.commit_interval_s
        events = link.poll(0.05, max_messages=config.commit_max_segments)
        while len(events) < config.commit_max_segments and time.monotonic() < until:
            time.sleep(BURST_S)  # as the coordinator does
            events += link.poll(0.0, max_messages=config.commit_max_segments - len(events))
        batch = [e for e in events if isinstance(e, Received) and isinstance(e.message, SegmentData)]
        for session, data, _ in batch:
            assert isinstance(data, SegmentData)
            link.settle(session.session, data.seq)
        link.flush_acks()
        num_settled += len(batch)
        num_batches += bool(batch)
    return num_batches


def commit(service: Service, count: int) -> int:
    """Turn the coordinator's loop until ``count`` segments are committed; return the number of commits."""
    num_commits = num_committed = 0
    while num_committed < count:
        service.turn()
        after = service.num_segments
        num_commits += after > num_committed
        num_committed = after
    return num_commits


def measure(has_commit: bool, count: int, num_tokens: int, folder: Path) -> dict[str, float]:
    """Run one mode once; the database lives in ``folder``."""
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        service: Service | None = None
        if has_commit:
            service = Service(Path(run_dir), make_run(Path(run_dir), count))
            link = service.link
        else:
            link = ServerLink("tcp://127.0.0.1:0", RUN, TransportConfig(), allocate_session=lambda hello: 1)
        sizes = [f"--segments={count}", f"--tokens={num_tokens}"]
        command = [sys.executable, __file__, "--client", link.address, *sizes]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        cpu_began = time.process_time()
        num_commits = acknowledge(link, count) if service is None else commit(service, count)
        cpu_s = time.process_time() - cpu_began
        while child.poll() is None:
            if service is None:
                link.poll(0.05)
                link.flush_acks()
            else:
                service.turn()
        assert child.stdout is not None
        report = json.loads(child.stdout.read())
        assert not link.rejected, link.rejected
        if service is None:
            link.close()
        else:
            assert not service.num_dropped
            service.close()
    return {
        "segments_per_s": count / report["wall_s"],
        "client_cpu_us": 1e6 * report["cpu_s"] / count,
        "server_cpu_us": 1e6 * cpu_s / count,
        "segments_per_commit": count / num_commits if num_commits else 0.0,
        "num_resent": report["num_resent"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--segments", type=int, default=15_000, help="segments per round and mode")
    parser.add_argument("--tokens", type=int, default=2_600, help="tokens per segment; 2,600 make 16 kB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the database")
    parser.add_argument("--json", type=Path, help="also write the report here")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        run_client(options.client, options.segments, options.tokens)
        return
    num_bytes = len(encode_segment(make_segments(1, options.tokens)[0]))
    measure(True, 1000, options.tokens, options.folder)  # warm caches and code paths
    rounds = [
        {
            "link": measure(False, options.segments, options.tokens, options.folder),
            "commit": measure(True, options.segments, options.tokens, options.folder),
        }
        for _ in range(options.rounds)
    ]
    names = list(rounds[0]["link"])
    median = {
        mode: {name: statistics.median(one[mode][name] for one in rounds) for name in names}
        for mode in ("link", "commit")
    }
    rates = [(one["commit"]["segments_per_s"], one["link"]["segments_per_s"]) for one in rounds]
    ratio = statistics.median(commit / link for commit, link in rates)
    print(f"{num_bytes} bytes per segment, {options.segments} segments, {options.rounds} rounds, medians")
    heads = ("segments/s", "MB/s", "actor us", "coord. us", "per commit")
    print(" " * 10 + "".join(f"{head:>12}" for head in heads))
    for mode, values in median.items():
        rate = values["segments_per_s"]
        cells = (rate, rate * num_bytes / 1e6, *(values[name] for name in names[1:4]))
        print(f"{mode:10}" + "".join(f"{cell:12,.1f}" for cell in cells))
    rate = median["commit"]["segments_per_s"]
    verdict = "reached" if rate >= GOAL_PER_S and ratio >= GOAL_FRAC else "NOT reached"
    print(f"commit / link = {ratio:.2f}; goal: {GOAL_PER_S:,.0f} segments/s and {GOAL_FRAC:.2f}: {verdict}")
    report = {
        "bytes_per_segment": num_bytes,
        "segments": options.segments,
        "median": median,
        "commit_to_link_ratio": ratio,
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg(),
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "zmq": zmq.zmq_version(),
            "sqlite": sqlite3.sqlite_version,
        },
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    else:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
