"""Runs the PTX that Triton compiles, without a GPU: the compiled kernels in a CI that has none.

What it is: an interpreter of PTX in C++ (``machine/``), warps in lockstep, programs and warps interleaved at random,
with bounds and alignment checked at every access, a first-level cache that can be stale, and a race detector.

What it is not: it knows NVIDIA's PTX alone, not the machine code made of it; memory is sequentially consistent but for
that cache; and its clock is a model.
"""

import os

EMULATED = os.environ.get("FASTCONFIG_EMULATE")
"""The architecture that the tests of this process run compiled kernels for, such as sm_90, or None."""
