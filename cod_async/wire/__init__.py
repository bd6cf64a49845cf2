"""The protocol: messages, their bytes, and the session that makes delivery certain. Pure; no socket, no
clock.

:mod:`~cod_async.wire.messages` says what is said, :mod:`~cod_async.wire.codec` turns it into two checked
frames and back, :mod:`~cod_async.wire.validate` checks what a segment claims, and
:mod:`~cod_async.wire.session` holds the state machines of both sides, which the model check in the tests
explores and the sockets of :mod:`cod_async.transport` run.
"""
