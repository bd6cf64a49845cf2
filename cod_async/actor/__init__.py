"""Actors play lifecycles: leases in, sealed segments out. See :mod:`cod_async.actor.worker`."""
