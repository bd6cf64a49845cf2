"""SGLang servers as an engine: the only room that speaks SGLang's HTTP interface.

From the wire up:

- :mod:`.http` (bounded requests, one error class per kind of trouble), :mod:`.stream` (events out of bytes),
  :mod:`.protocol` (what is exchanged, in our own terms; version labels), :mod:`.answers` (the servers'
  shapes, and the checks that make them trustworthy);
- one server: :mod:`.completions` (requests, stop tokens, deadlines), :mod:`.client` (these, and control);
- weights: :mod:`.pushes` (how they enter a server, and whether they arrived), :mod:`.switching` (one change,
  which always ends with a resume), :mod:`.budget` (what a retraction costs), :mod:`.updates` (when to change,
  and what follows when that fails);
- many servers: :mod:`.attempts` (one request at one server), :mod:`.slot` (a server's connection and health),
  :mod:`.affinity` (which lifecycle lives where), :mod:`.pool` (all servers of an actor), :mod:`.tally`
  (counters), :mod:`.opening` (what a run needs of its servers), :mod:`.engine` (them all as one
  :class:`cod_async.engines.base.Engine`);
- with the launcher: :mod:`.command` (how a server is started), :mod:`.records` (where it is found),
  :mod:`.dealing` (whose it is), :mod:`.complaints` (what its host is told);
- :mod:`.conformance` (what ``cod doctor`` looks at).
"""
