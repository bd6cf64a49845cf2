"""Hidden buttons: the smallest world in which connecting the dots pays; see the README beside this file."""

from cod_async.envs.hidden_buttons.env import SPEC, HiddenButtons

__all__ = ["SPEC", "HiddenButtons"]
