"""Speed of the environments alone: episodes, steps and pack set-up, without any model."""

import os

# Before NumPy is loaded: numbers are per core, and idle threads of a linear algebra library would count.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
