#include "races.hpp"

namespace ptx {

bool BlockOrder::is_after(const Access& access, int thread) const {
    if (access.block == block) {
        if (access.thread == thread || access.epoch < epoch) return true;
        if (access.thread / kLanes == thread / kLanes &&
            access.clock <= warp_knows[thread / kLanes][access.thread % kLanes]) {
            return true;
        }
    }
    if (shared.holds(access)) return true;
    if (own.empty()) return false;
    for (const int key : {thread, -1 - thread / kLanes}) {
        const auto found = own.find(key);
        if (found != own.end() && found->second.holds(access)) return true;
    }
    return false;
}

void BlockOrder::barrier() {
    ++epoch;
    for (auto& [key, knowledge] : own) shared.join(knowledge);
    own.clear();
}

void BlockOrder::warp_barrier(int warp) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const int thread = warp * kLanes + lane;
        warp_knows[warp][lane] = clocks[thread]++;
        const auto found = own.find(thread);
        if (found == own.end()) continue;
        own[-1 - warp].join(Knowledge(found->second));
        own.erase(thread);
    }
}

Knowledge BlockOrder::released(int thread) {
    Knowledge all = shared;
    const int warp = thread / kLanes;
    for (const int key : {thread, -1 - warp}) {
        const auto found = own.find(key);
        if (found != own.end()) all.join(found->second);
    }
    Known& here = all.of(block);
    here.epoch = epoch;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (warp_knows[warp][lane] >= 0) here.clocks[warp * kLanes + lane] = warp_knows[warp][lane];
    }
    here.clocks[thread] = clocks[thread]++;
    return all;
}

}  // namespace ptx
