"""The domain, pure: packs, segments, hints, rendering and the rollout loop; without torch and zmq.

* :mod:`.segment`, :mod:`.arrays`: the nouns, as they travel and rest.
* :mod:`.seeds`: stable hashes, from which everything random is seeded.
* :mod:`.packs`: which tasks and which hidden world a group plays.
* :mod:`.hint`, :mod:`.parsing`: the prompts of both episode kinds, and what counts as a well-formed hint.
* :mod:`.rendering`: messages to token ids, appended and never rendered anew.
* :mod:`.documents`: bootstrap documents in the very token format of the rollout.
* :mod:`.rollout`, :mod:`.episodes`: the solve/update loop that seals segments.
"""
