"""cod-async: off-policy asynchronous actor-learner RL of LLM agents over long lifecycles of related tasks.

Importing this package loads nothing else. Start reading at ``ARCHITECTURE.md``: the life of a segment.
"""

__version__ = "0.1.0"
