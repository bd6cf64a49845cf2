"""The run database: one SQLite file that knows every segment, lease, step and version of a run.

The coordinator is its only writer (:class:`cod_async.store.database.RunStore`); everyone else reads it
(:mod:`cod_async.store.ledger`, :mod:`cod_async.store.inspect`). What is not committed here was never
acknowledged, so a crash between any two instructions loses nothing that anybody was promised.
"""
