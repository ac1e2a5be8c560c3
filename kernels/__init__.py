"""Triton kernels of fastconfig, for CUDA and ROCm.

They import triton and nothing else; ``fastconfig.backends.triton`` launches them.

Which file answers what: how rows are addressed and read, ``rows``; the Gramian, ``gramian``; how the programs' partial
sums become one, ``arrival``; ConFIG's weights, ``config_rule``; the combination, ``combination``; what is launched,
``launched``; with how many programs and warps, ``geometry``.
"""
