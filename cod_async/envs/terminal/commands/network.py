"""Commands between the two machines: ssh, exit, scp, rsync."""

from __future__ import annotations

import re

from cod_async.envs.terminal.commands.files import target_of
from cod_async.envs.terminal.commands.flags import need_operands, read_options
from cod_async.envs.terminal.filesystem import Directory, FileSystemError, Node, Path, weight
from cod_async.envs.terminal.machine import Machine
from cod_async.envs.terminal.terminal import Call, CommandError

_REMOTE = re.compile(r"(?:([^@/\\:\s]+)@)?([^@/\\:\s]+):(.*)", re.DOTALL)
_ADDRESS = re.compile(r"[0-9.]+", re.ASCII)


def _unreachable(command: str, host: str) -> CommandError:
    if _ADDRESS.fullmatch(host):
        return CommandError(f"{command}: connect to host {host} port 22: Connection timed out")
    return CommandError(f"{command}: Could not resolve hostname {host}: Name or service not known")


def ssh(call: Call) -> None:
    """Log in to the remote host, or run one command line there and come back."""
    terminal = call.terminal
    words = list(call.words)
    # Words behind the target belong to the remote command: only what stands before it are options.
    num_before = next((i for i, word in enumerate(words) if "@" in word), len(words) - 1) + 1
    call.words = words[:num_before]
    options = read_options(call, "tTqvxXAaCNnf46y", with_value="pioFlLRDbcmEeIJQSwW")
    if not options.operands:
        raise CommandError("usage: ssh [options] user@host [command]")
    user, at, host = options.operands[0].rpartition("@")
    user = user if at else options.values.get("l", "user")
    if terminal.is_remote:
        raise CommandError(
            f"ssh: connect to host {host} port 22: Connection refused (exit this session first)"
        )
    if host != terminal.remote.host:
        raise _unreachable("ssh", host)
    if user != terminal.remote.user:
        raise CommandError(f"{user}@{host}: Permission denied (publickey).")
    command = " ".join([*options.operands[1:], *words[num_before:]])
    terminal.connect()
    if not command.strip():
        call.say(f"Welcome to {host} (Linux).")
        return
    result = terminal.run_nested(command)
    terminal.disconnect()
    if result.output:
        call.say(result.output)
    call.has_failed = result.is_error


def exit_session(call: Call) -> None:
    """Leave the remote host."""
    if not call.terminal.is_remote:
        raise CommandError(call.machine.shell_error("exit: not in a remote session"))
    call.terminal.disconnect()
    call.say(f"logout\nConnection to {call.machine.host} closed.")


def scp(call: Call) -> None:
    """Copy between the local machine and the remote host, with ``-r`` also directories."""
    options = read_options(call, "rpqvC346BTO", with_value="PiocFlJSX")
    _transfer(call, options.operands, is_recursive=options.has("r"), takes_contents=False)


def rsync(call: Call) -> None:
    """Copy like a recursive scp; a source that ends with a slash means what is in it."""
    operands = read_options(call, "avzrhPptuqgoDlnc", with_value="e", is_strict=False).operands
    _transfer(call, operands, is_recursive=True, takes_contents=not call.is_parity)


def _remote_text(call: Call, word: str) -> str | None:
    """Return the path of a ``[user@]host:path`` word, or None for a local one (``C:`` is a drive).

    Raises:
        CommandError: another host than the remote one. The user is not looked at.
    """
    match = _REMOTE.fullmatch(word)
    if match is None or (call.machine.is_windows and len(match.group(2)) == 1 and not match.group(1)):
        return None
    if match.group(2) != call.terminal.remote.host:
        raise _unreachable("ssh", match.group(2))
    return match.group(3)


def _transfer(call: Call, operands: list[str], is_recursive: bool, takes_contents: bool) -> None:
    """Copy the first operands to the last one; exactly one side is remote.

    Args:
        call: the command.
        operands: sources and destination, as typed.
        is_recursive: whether directories are copied.
        takes_contents: whether a source that ends with a slash means the entries of a directory.

    Raises:
        CommandError: not run on the local machine, wrong operands, or an unknown host.
    """
    terminal = call.terminal
    if terminal.is_remote:
        raise CommandError(
            f"{call.name}: cannot reach the other machine from here; run it on the local machine"
        )
    need_operands(call, operands, 2)
    remote_texts = [_remote_text(call, word) for word in operands]
    is_download = all(text is not None for text in remote_texts[:-1]) and remote_texts[-1] is None
    is_upload = all(text is None for text in remote_texts[:-1]) and remote_texts[-1] is not None
    if not is_download and not is_upload:
        raise CommandError(f"{call.name}: exactly one side must be remote (user@host:path)")
    source_machine, machine = terminal.local, terminal.remote
    if is_download:
        source_machine, machine = machine, source_machine
    texts = [word if text is None else text for word, text in zip(operands, remote_texts, strict=True)]
    try:
        destination = _path(call, machine, texts[-1])
        if len(operands) > 2:
            machine.files.directory(destination)
    except FileSystemError as error:
        call.fail(_words(call, texts[-1], error))
        return
    for text in texts[:-1]:
        culprit = text
        try:
            path = _path(call, source_machine, text)
            node = source_machine.files.get(path)
            call.charge(weight(node))
            if isinstance(node, Directory) and not is_recursive:
                call.fail(f"{call.name}: {text}: not a regular file")
                continue
            culprit = texts[-1]
            is_contents = takes_contents and source_machine.has_trailing_separator(text)
            _store(machine, destination, texts[-1], node, is_contents and isinstance(node, Directory))
            call.say(f"{node.name} 100%")
        except FileSystemError as error:
            call.fail(_words(call, culprit, error))


def _store(machine: Machine, destination: Path, typed: str, node: Node, is_contents: bool) -> None:
    if is_contents:
        machine.files.directory(destination[:-1])
        target = destination
    else:
        target = target_of(machine, destination, typed or ".", node)
    machine.files.merge(target, machine.files.copy_of(node))


def _path(call: Call, machine: Machine, text: str) -> Path:
    """Return the path of one side; remote ones start at the remote home."""
    if machine is call.terminal.local:
        return machine.resolve(text)
    if not call.is_parity and (text == "~" or text.startswith("~/")):
        text = "." + text[1:]
    return machine.resolve(text or ".", start=machine.home)


def _words(call: Call, text: str, error: FileSystemError) -> str:
    """Word a refusal; these tools speak Unix on every operating system."""
    return call.terminal.remote.complain(call.name, text, error.reason)
