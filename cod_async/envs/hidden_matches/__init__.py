"""Hidden matches: which key opens which room, which tool repairs which machine; see the README beside."""

from cod_async.envs.hidden_matches.env import SPEC, HiddenMatches

__all__ = ["SPEC", "HiddenMatches"]
