"""Benchmarks of the learner: what the layouts of rows save, beside a plain transformers loop."""
