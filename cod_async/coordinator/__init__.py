"""The coordinator: plans packs, hands out leases, takes in segments, assigns credit and selects each step's
batch.

Its mind is :class:`cod_async.coordinator.brain.Brain`, which knows messages and the run database and nothing
of sockets; :mod:`cod_async.coordinator.service` is the process around it. It loads no torch.
"""
