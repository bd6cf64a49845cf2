"""The commands that exist in the simulated terminal, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cod_async.envs.terminal.commands import archives, files, looking, network, zipping
from cod_async.envs.terminal.terminal import Command

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "ls": looking.ls,
        "cd": looking.cd,
        "pwd": looking.pwd,
        "cat": looking.cat,
        "echo": looking.echo,
        "whoami": looking.whoami,
        "mkdir": files.mkdir,
        "cp": files.cp,
        "mv": files.mv,
        "rm": files.rm,
        "touch": files.touch,
        "chmod": files.chmod,
        "ssh": network.ssh,
        "exit": network.exit_session,
        "scp": network.scp,
        "rsync": network.rsync,
        "tar": archives.tar,
        "gzip": archives.gzip,
        "gunzip": archives.gunzip,
        "zip": zipping.zip_files,
        "unzip": zipping.unzip,
    }
)
"""Command name -> what it does. Aliases and what Windows lacks are in :mod:`..terminal`."""

__all__ = ["COMMANDS"]
