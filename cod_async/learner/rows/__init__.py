"""Rows: from a step's segments to the micro-batches that a model computes, in one of three layouts."""
