// AVX-512 (F, BW, DQ, VL), with FMA and F16C: x86 servers from Skylake-SP (2017) and Zen 4 (2022) on.
#include "tier.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#define FASTCONFIG_TIER_NAME "avx512"
#define FASTCONFIG_VECTOR_BYTES 64
#define FASTCONFIG_X86 1
// Intel converts on the ports that multiply, AMD beside them.
#define FASTCONFIG_PACKS (__builtin_cpu_is("intel") != 0)

// After every header: nothing but this tier's own code, internal to this file, may hold these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace fastconfig {
namespace {
#include "tier_kernels.hpp"
}  // namespace
}  // namespace fastconfig

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastconfig {
const Tier* avx512_tier() { return &kTier; }
}  // namespace fastconfig

#else
namespace fastconfig {
const Tier* avx512_tier() { return nullptr; }
}  // namespace fastconfig
#endif
