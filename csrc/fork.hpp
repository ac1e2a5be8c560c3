// Threads and fork(): OpenMP's threads stay behind in the parent, and a team in the child would wait for them for ever.
#pragma once

namespace fastconfig {

// How many of `wanted` threads may take part: one in a child whose parent had several.
int threads_after_fork(int wanted);

}  // namespace fastconfig
