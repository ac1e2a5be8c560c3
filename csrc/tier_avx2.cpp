// AVX2, FMA and F16C: x86 from Haswell (2013) and Excavator (2015) on.
#include "tier.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#define FASTCONFIG_TIER_NAME "avx2"
#define FASTCONFIG_VECTOR_BYTES 32
#define FASTCONFIG_X86 1
#define FASTCONFIG_PACKS false

// After every header: nothing but this tier's own code, internal to this file, may hold these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
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
const Tier* avx2_tier() { return &kTier; }
}  // namespace fastconfig

#else
namespace fastconfig {
const Tier* avx2_tier() { return nullptr; }
}  // namespace fastconfig
#endif
