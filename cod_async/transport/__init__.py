"""The link between processes: sessions of :mod:`cod_async.wire` over ZMQ, or over a folder of files for
debugging.

Nothing counts as delivered until it is acknowledged, and the coordinator acknowledges after its commit. This
package loads no torch.

The coordinator's end, one thread::

    from cod_async.transport.link import Closed, Opened, Received, ServerLink

    link = ServerLink(config.transport.bind, run_id, config.transport,
                      allocate_session=store.allocate_session,        # (Hello) -> epoch: durable, growing,
                      from 1 known_sessions=store.live_sessions(),           # [KnownSession(epoch, role,
                      name)] before a restart preferred_address=address_before_the_restart)   # or None
    write_coordinator_json(link.address)
    while running:
        batch = []
        for event in link.poll(timeout_s=0.01):                       # drains up to 512 messages
            match event:
                case Opened(session, is_continued):                   # Welcome is already sent
                    ...                                               # not continued: it holds no leases
                case Closed(session, reason):                         # expired | replaced | bye
                    ...                                               # free its leases, mark the epoch closed
                case Received(session, SegmentData() as data, num_bytes):
                    batch.append((session, data))                     # never a duplicate within the session
                case Received(session, message, num_bytes):
                    ...                                               # Heartbeat, requests, Bye
                    link.send(session.session, reply)
        for session, data in batch:
            try:
                validate_segment(data.segment, run=run_id, pack_size=4, ...)     # cod_async.wire.codec
                reason = store.add(data.segment)                      # None, or "fenced", "duplicate", …
            except WireError as error:
                reason = error.code
            link.settle(session.session, data.seq, reason)
        store.commit()
        link.flush_acks()                                             # one Ack per client, after the commit
    link.broadcast(Stop(reason="..."))                                # again to whoever opens a session later

``allocate_session`` is called inside ``poll``. ``link.sessions`` maps epochs to live sessions;
``link.rejected`` counts refusals by code. ``send`` may lose a message together with a connection: answer
repeated requests again, repeat Stop and Fence when an Opened or a Heartbeat shows that the client did not
hear. ``settle`` for a session that has closed is ignored. ``set_credit_open(False)`` withdraws credit while
the database is full; ``set_manifest`` sets what Welcome tells.

A client's end, with an I/O thread of its own, here the learner::

    from cod_async.transport.link import ClientLink

    link = ClientLink.for_run(run_dir, config, role="learner", name="learner")
    link.set_heartbeat(lambda: Heartbeat(counters={...}))             # runs on the I/O thread: only read
    link.start(on_message=inbox.put)                                  # Welcome, Stop, NewVersion, fatal
    Refused opened = link.request(OpenLineage(branch=None, trained_digest="", nonce="..."))  # sent until
    answered parts = link.request(StepRequest(version=Version(opened.lineage, 0)))            #
    list[StepBatch], all parts link.close(Bye(counters={...}))

An actor, inside its asyncio loop (``receive`` runs in the loop)::

    from cod_async.transport.async_client import AsyncClient

    client = AsyncClient(address_source(run_dir), "actor", "actor-0", config.run.name, config.transport,
    receive) client.start()
    leases = await client.request(LeaseRequest(request=1, num_lifecycles=8))
    outbox_id = await client.send_segment(segment)                    # waits while the outbox is full
    assert await client.wait_settled(outbox_id) == "acked"            # or the reason of its drop
    await client.close(Bye(counters={...}), drain_s=10)               # waits for the outbox to empty

A Welcome with ``is_continued=False`` means that the leases held so far are lost; segments not yet
acknowledged are offered again all the same. A segment whose lease is fenced before it was ever sent is
settled with ``fenced_before_send``; every other reason comes from the coordinator. After a fatal Refused
every call raises ProtocolRefusedError.
"""
