"""The bytes of protocol 2 are frozen: what an older process sends is understood, and today's bytes are these.

``protocol_2.json`` was written once. When a message changes on purpose, either the new field has a default
and is left out when it has it (then the old bytes still decode, and are kept), or the protocol version grows
and a new file is added beside this one. Protocol 1 had no transcripts; its processes are refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from wire_samples import RUN, TO_CLIENT, TO_COORDINATOR

from cod_async.errors import WireError
from cod_async.wire.codec import decode_for_client, decode_for_coordinator, encode
from cod_async.wire.messages import PROTOCOL_VERSION, ToClient, ToCoordinator

FROZEN = json.loads(Path(__file__).with_name("protocol_2.json").read_text())
SESSION = 4


def frozen_parts(name: str) -> list[bytes]:
    return [bytes.fromhex(part) for part in FROZEN[name]]


def test_every_message_type_is_frozen() -> None:
    tags = {cls.__struct_config__.tag for cls in (*get_args(ToCoordinator), *get_args(ToClient))}
    assert set(FROZEN) == tags == set(TO_COORDINATOR) | set(TO_CLIENT)
    assert PROTOCOL_VERSION == 2


@pytest.mark.parametrize("name", sorted(TO_COORDINATOR))
def test_coordinator_still_understands(name: str) -> None:
    envelope, message = decode_for_coordinator(frozen_parts(name), run=RUN)
    assert message == TO_COORDINATOR[name]
    assert (envelope.protocol, envelope.run, envelope.session) == (2, RUN, SESSION)


@pytest.mark.parametrize("name", sorted(TO_CLIENT))
def test_client_still_understands(name: str) -> None:
    assert decode_for_client(frozen_parts(name), run=RUN)[1] == TO_CLIENT[name]


@pytest.mark.parametrize("name", sorted(TO_COORDINATOR | TO_CLIENT))
def test_todays_bytes_are_the_frozen_ones(name: str) -> None:
    assert encode((TO_COORDINATOR | TO_CLIENT)[name], run=RUN, session=SESSION) == frozen_parts(name)


@pytest.mark.parametrize("name", sorted(TO_COORDINATOR))
def test_an_older_protocol_is_refused_by_name(name: str) -> None:
    older = json.loads(Path(__file__).with_name("protocol_1.json").read_text())[name]
    with pytest.raises(WireError, match="peer speaks protocol 1, this side speaks 2") as caught:
        decode_for_coordinator([bytes.fromhex(part) for part in older], run=RUN)
    assert caught.value.code == "protocol"
