"""Who may connect: loopback without keys, every other address only with CURVE keys on both sides.

Keys are certificate files as ZMQ writes them (``*.key`` public, ``*.key_secret`` secret). A server has a
secret key and a folder of the public keys that it lets in; a client has a secret key of its own and the
server's public key. A connection without a known key gets no answer at all.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.auth

from cod_async.errors import InputError
from cod_async.loopback import is_loopback


@dataclass(frozen=True)
class ServerKeys:
    """Files of a server: its secret key, and a folder with a ``*.key`` file per client that is let in."""

    secret_key_file: Path
    authorized_keys_dir: Path


@dataclass(frozen=True)
class ClientKeys:
    """Files of a client: its secret key, and the public key of the server."""

    secret_key_file: Path
    server_key_file: Path


def check_address(address: str, what: str, *, has_keys: bool) -> None:
    """Refuse what is no address, and one beyond loopback without keys.

    Args:
        address: ``tcp://host:port`` or ``ipc://path``.
        what: the setting or flag that it came from, for the message.
        has_keys: whether the connection is authenticated.

    Raises:
        InputError: see above.
    """
    if re.fullmatch(r"ipc://.+", address):
        return
    match = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.]+\]|[^:\[\]/\s]+):([0-9]{1,5}|\*)", address)
    if match is None or (match[2] != "*" and int(match[2]) > 65535):
        raise InputError(f"{what}: {address!r} is not an address; write tcp://host:port")
    if not is_loopback(match[1].strip("[]")) and not has_keys:
        raise InputError(
            f"{what}: {address!r} leaves this machine, which needs keys; use tcp://127.0.0.1, or give keys"
        )


class Doorkeeper:
    """Makes a server's socket ask for keys, and lets in whose key is in the folder.

    Args:
        context: of the socket.
        zmq_socket: a ROUTER that is not bound yet.
        keys: the files.

    Raises:
        InputError: a file is missing, is no key, or the secret can be read by others.
    """

    def __init__(self, context: zmq.Context[Any], zmq_socket: zmq.Socket[bytes], keys: ServerKeys) -> None:
        from zmq.auth.thread import ThreadAuthenticator

        public, secret = _read_secret(keys.secret_key_file)
        if not keys.authorized_keys_dir.is_dir():
            raise InputError(
                f"{keys.authorized_keys_dir}: no such folder; put the clients' *.key files there"
            )
        if not any(keys.authorized_keys_dir.glob("*.key")):
            raise InputError(f"{keys.authorized_keys_dir}: has no *.key file, so nobody could connect")
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=str(keys.authorized_keys_dir))
        zmq_socket.curve_publickey = public
        zmq_socket.curve_secretkey = secret
        zmq_socket.curve_server = True

    def close(self) -> None:
        """Stop answering ZMQ's questions about keys; close the socket first."""
        self._authenticator.stop()


def use_client_keys(zmq_socket: zmq.Socket[bytes], keys: ClientKeys) -> None:
    """Make a client's socket show its key and insist on the server's.

    Raises:
        InputError: a file is missing, is no key, or the secret can be read by others.
    """
    public, secret = _read_secret(keys.secret_key_file)
    zmq_socket.curve_publickey = public
    zmq_socket.curve_secretkey = secret
    zmq_socket.curve_serverkey = _read(keys.server_key_file)[0]


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is not a key file ({error})") from None


def _read_secret(path: Path) -> tuple[bytes, bytes]:
    public, secret = _read(path)
    if secret is None:
        raise InputError(f"{path}: has no secret key in it; give the *.key_secret file")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"{path}: can be read by others; run chmod 600 on it")
    return public, secret
