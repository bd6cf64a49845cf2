"""What people see of a run: metrics, progress, plots, TensorBoard, transcripts, the summary.

Everything here reads files that the run leaves behind (``metrics.jsonl``, the run database, evaluation
reports) and nothing upstream imports it, so a broken plot can never break training. Import from the modules
directly.
"""
