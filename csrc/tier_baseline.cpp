// The tier every machine of the architecture runs: 16-byte vectors and no intrinsics.
#include "tier.hpp"

#define FASTCONFIG_TIER_NAME "baseline"
#define FASTCONFIG_VECTOR_BYTES 16
#define FASTCONFIG_X86 0
#define FASTCONFIG_PACKS false

namespace fastconfig {
namespace {
#include "tier_kernels.hpp"
}  // namespace

const Tier* baseline_tier() { return &kTier; }

}  // namespace fastconfig
