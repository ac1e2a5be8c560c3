// A happens-before race detector over threads and programs.
//
// Two accesses to one byte, one of them a write, must be ordered: by one thread's program; by a barrier of the program
// (or of the warp, among its lanes); or, between programs, by a release that an acquire saw, both being atomics with
// acq_rel at the device's scope, and what barriers and earlier acquires put before it. A write of the value that is
// already there is no race: Triton lets every thread that holds a copy of an element store it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "program.hpp"

namespace ptx {

struct Access {
    int32_t block;
    int32_t epoch;  // barriers of the block before it
    int32_t clock;  // of the thread: what it released or synchronised before
    int32_t pc;
    int16_t thread;
    uint8_t bytes;  // which of the cell's four
    bool is_write;
    bool is_atomic;
};

// What is known of one block: all before an epoch, and of single threads all up to a clock.
struct Known {
    int32_t epoch = 0;
    std::map<int32_t, int32_t> clocks;  // thread -> clock

    bool holds(const Access& access) const {
        if (access.epoch < epoch) return true;
        const auto found = clocks.find(access.thread);
        return found != clocks.end() && access.clock <= found->second;
    }
    void join(const Known& other) {
        if (other.epoch > epoch) epoch = other.epoch;
        for (const auto& [thread, clock] : other.clocks) {
            auto& mine = clocks.try_emplace(thread, -1).first->second;
            if (clock > mine) mine = clock;
        }
    }
};

// What is known of all blocks: a vector clock, but that most of its entries are the same.
class Knowledge {
 public:
    bool holds(const Access& access) const {
        const auto found = blocks_.find(access.block);
        return found != blocks_.end() && found->second.holds(access);
    }
    void join(const Knowledge& other) {
        for (const auto& [block, known] : other.blocks_) blocks_[block].join(known);
    }
    Known& of(int block) { return blocks_[block]; }
    bool empty() const { return blocks_.empty(); }
    void clear() { blocks_.clear(); }

 private:
    std::map<int32_t, Known> blocks_;
};

// One block's place in the order of things.
struct BlockOrder {
    int block = 0;
    int epoch = 0;
    std::vector<int32_t> clocks;                          // a thread's own
    std::vector<std::array<int32_t, kLanes>> warp_knows;  // a warp: its lanes' clocks at its last barrier
    Knowledge shared;                                     // what all threads know, since a barrier
    std::unordered_map<int, Knowledge> own;               // what a thread, or a warp (-1 - number), knows besides

    BlockOrder(int number, int threads) : block(number), clocks(threads, 0), warp_knows(threads / kLanes) {
        for (auto& lanes : warp_knows) lanes.fill(-1);
    }
    bool is_after(const Access& access, int thread) const;
    void barrier();
    void warp_barrier(int warp);
    Knowledge released(int thread);
    void acquire(int thread, const Knowledge& knowledge) { own[thread].join(knowledge); }
};

enum RaceKind { kWriteWrite, kWriteRead, kReadWrite };

struct Race {
    int32_t first_pc, second_pc, kind;
    int32_t same_block, same_warp, is_shared;
    int64_t address;
    int64_t count;
};

// What was last read and written where, of one memory: the global one, or a block's shared one.
class Shadow {
 public:
    void clear() { pages_.clear(), last_ = nullptr; }

    // `same` says that a write changes nothing.
    template <class Report>
    void touch(uint64_t address, int bytes, bool same, const Access& access, const BlockOrder& order, Report report) {
        while (bytes > 0) {
            const int skipped = int(address & 3), here = bytes < 4 - skipped ? bytes : 4 - skipped;
            Access part = access;
            part.bytes = uint8_t(((1 << here) - 1) << skipped);
            touch_cell(cell(address), same, part, order, report);
            address += here, bytes -= here;
        }
    }

 private:
    using Cell = std::vector<Access>;
    using Page = std::array<Cell, 256>;

    Cell& cell(uint64_t address) {
        const uint64_t page = address >> 10;
        if (last_ == nullptr || page != last_page_) {
            auto& found = pages_[page];
            if (found == nullptr) found = std::make_unique<Page>();
            last_ = found.get(), last_page_ = page;
        }
        return (*last_)[(address >> 2) & 255];
    }

    template <class Report>
    static void touch_cell(Cell& cell, bool same, const Access& access, const BlockOrder& order, Report report) {
        size_t kept = 0;
        bool is_recorded = false;
        for (size_t i = 0; i < cell.size(); ++i) {
            Access& other = cell[i];
            const bool own = other.block == access.block && other.thread == access.thread;
            const bool overlap = other.bytes & access.bytes;
            const bool is_before = own || order.is_after(other, access.thread);
            if (overlap && !is_before && !(access.is_write && same) && (access.is_write || other.is_write) &&
                !(access.is_atomic && other.is_atomic)) {
                report(other, access.is_write ? (other.is_write ? kWriteWrite : kReadWrite) : kWriteRead);
            }
            // What is after a write that is after this access is after both; so it is with a read after a read.
            const bool covered =
                (other.bytes & ~access.bytes) == 0 && is_before && (access.is_write || !other.is_write);
            if (covered && !access.is_write && own && !is_recorded) {
                other = access, is_recorded = true;
            } else if (covered) {
                continue;
            }
            if (kept != i) cell[kept] = cell[i];
            ++kept;
        }
        cell.resize(kept);
        if (!is_recorded) cell.push_back(access);
    }

    std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
    Page* last_ = nullptr;
    uint64_t last_page_ = 0;
};

}  // namespace ptx
