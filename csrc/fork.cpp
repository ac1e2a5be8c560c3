#include "fork.hpp"

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastconfig {
namespace {

std::atomic<bool> had_several{false};
std::atomic<bool> is_child{false};

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { is_child = had_several.load(); });
#endif

}  // namespace

int threads_after_fork(int wanted) {
    if (wanted <= 1 || is_child.load(std::memory_order_relaxed)) return 1;
    if (!had_several.load(std::memory_order_relaxed)) had_several = true;
    return wanted;
}

}  // namespace fastconfig
