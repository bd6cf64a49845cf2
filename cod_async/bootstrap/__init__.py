"""The starting model: a tiny transformer that knows the format and note-taking, and no use of hints.

``run`` makes the model directory, ``trainer`` is the supervised training behind it. The documents come from
the environment, so that what is taught is written down beside the world it is about.
"""
