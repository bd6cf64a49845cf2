"""Loss, gradient and metrics of segment-advantage policy optimisation; see README.md."""
