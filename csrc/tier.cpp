#include "tier.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastconfig {
namespace {

#if defined(__x86_64__)
// Not every clang knows "f16c" in __builtin_cpu_supports.
bool machine_has_f16c() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool machine_has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && machine_has_f16c();
}

bool machine_has_avx512() {
    return machine_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool machine_has_avx2() { return false; }
bool machine_has_avx512() { return false; }
#endif

}  // namespace

int available_tiers(const Tier** tiers, int capacity) {
    const Tier* candidates[] = {baseline_tier(), machine_has_avx2() ? avx2_tier() : nullptr,
                                machine_has_avx512() ? avx512_tier() : nullptr};
    int count = 0;
    for (const Tier* tier : candidates)
        if (tier != nullptr && count < capacity) tiers[count++] = tier;
    return count;
}

}  // namespace fastconfig
