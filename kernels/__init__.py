"""Triton kernels of fastconfig, for CUDA and ROCm.

They import triton and nothing else; ``fastconfig.backends.triton`` launches them.

Which file answers what: how rows are addressed and read, ``rows``; the Gramian, ``gramian``; without matrix units, or
with few units at all for float64, ``pairs`` and ``two_float``; how the programs' partial sums become one, ``arrival``
and ``whole_gramian``; ConFIG's weights, ``config_rule``; the combination, ``combination``; GradDrop, ``graddrop``; what
is launched, ``launched``; with how many programs and warps, ``geometry``.

Of the other methods: linear systems of any principal block, ``pivoting``; minima over y ≥ 0, ``quadratic``; bargains,
``newton``; gradients changed by each other, ``surgery``; descent on the simplex, ``simplex``; what these make of each
method, ``gramian_rules``; what is launched, ``launched_rules``.

Of M-ConFIG: how gradients enter the averages, ``averages``; its m×m part, ``decision``; what is written, ``writing``;
where parameters lie and what they step by, ``parameters``; what is launched, ``launched_momentum`` and, to write the
tables that those read, ``launched_tables``.
"""
