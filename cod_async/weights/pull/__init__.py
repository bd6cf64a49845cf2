"""Published weights over the network, for actors that share no disk with the learner.

A *server* (``cod weights RUN``) hands out the files of published versions in chunks; a *puller* in each actor
asks for them, checks them and commits them into a cache that is laid out like a run folder; a *relay*
(``cod weights --from ADDRESS``) stands between them and asks its own server once for what its clients ask for
often. The client asks for every chunk, so it is the client that sets the pace: nothing is sent that nobody
waits for. Loads no torch.
"""
