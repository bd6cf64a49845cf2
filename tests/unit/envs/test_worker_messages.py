"""Frames between an actor and its environment workers."""

from __future__ import annotations

import struct
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.base import Closing, Opening, StepResult, TaskSpec
from cod_async.envs.worker.messages import (
    MAX_FRAME_BYTES,
    Began,
    Close,
    Failed,
    Finish,
    Finished,
    FrameReader,
    Made,
    Make,
    Start,
    Started,
    Step,
    Stepped,
    decode_answer,
    decode_request,
    encode_frame,
)
from cod_async.envs.worker.results import checked_closing, checked_opening, checked_result
from cod_async.errors import InfrastructureError

TASK = TaskSpec("e", "p", {"a": [1, None]}, {"x": 1.5}, (1 << 64) - 1, 2, 3)
REQUESTS = [
    Make(call=1, instance=2, environment="e", options={"a": {"b": [True, 1.5, "x"]}}),
    Start(call=1, instance=2, task=TASK, state=b"\x00\xff"),
    Step(call=1, instance=2, response="é\n", is_response_cut=True),
    Finish(call=1, instance=2, messages=[("user", "a"), ("assistant", "b")], has_feedback=False),
    Finish(call=1, instance=2, messages=None, has_feedback=True),
    Close(instance=2),
]
ANSWERS = [
    Began(call=1),
    Made(
        call=1,
        name="e",
        prompt_style="full",
        is_resumable=True,
        is_step_penalized=False,
        has_update_prompts=False,
        snapshot=b"s",
    ),
    Started(call=1, opening=Opening("o", "s", 3)),
    Stepped(call=1, result=StepResult(observation="o", is_done=True, raw_reward=-0.5, metrics={"m": 2.0})),
    Finished(call=1, closing=Closing(None, "f", b"")),
    Failed(call=1, problems=("a", "b"), is_input=True),
]


@given(cuts=st.lists(st.integers(0, 2000), max_size=20))
@settings(max_examples=50, deadline=None)
def test_messages_survive_any_cutting(cuts: list[int]) -> None:
    for messages, decode in ((REQUESTS, decode_request), (ANSWERS, decode_answer)):
        stream = b"".join(map(encode_frame, messages))
        bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
        reader = FrameReader()
        found = [
            decode(payload) for start, stop in pairwise(bounds) for payload in reader.feed(stream[start:stop])
        ]
        assert found == messages


def test_frames_are_bounded() -> None:
    with pytest.raises(InfrastructureError, match="announces 67108865"):
        list(FrameReader().feed(struct.pack("<I", MAX_FRAME_BYTES + 1)))
    with pytest.raises(InfrastructureError, match=r"Step has \d+ bytes"):
        encode_frame(Step(call=1, instance=1, response="x" * MAX_FRAME_BYTES, is_response_cut=False))


def test_unknown_fields_and_messages_are_refused() -> None:
    for payload in (
        {"type": "Began", "call": 1, "more": 2},
        {"type": "Make", "call": 1},
        {"type": "Nothing"},
        7,
    ):
        with pytest.raises(msgspec.ValidationError):
            decode_answer(msgspec.msgpack.encode(payload))


def test_results_are_checked_where_they_enter() -> None:
    numpy = pytest.importorskip("numpy")
    result = checked_result(
        StepResult(
            observation="o",
            is_done=numpy.bool_(True),
            raw_reward=numpy.float32(0.5),
            metrics={"m": numpy.int64(3)},
        )
    )
    assert (result.is_done, result.raw_reward, result.metrics) == (True, 0.5, {"m": 3.0})
    assert type(result.raw_reward) is float and type(result.is_done) is bool
    assert checked_opening(Opening("o", "s", numpy.int64(2))) == Opening("o", "s", 2)
    assert checked_closing(Closing(None, "", bytearray(b"x"))) == Closing(None, "", b"x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_steps is 0"):
        checked_opening(Opening("o", "s", 0))
    with pytest.raises(TypeError, match="system_prompt is a NoneType"):
        checked_opening(Opening("o", None, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="snapshot returned a str"):
        checked_closing(Closing(None, "", "state"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step returned a tuple"):
        checked_result(("o", True))  # type: ignore[arg-type]
