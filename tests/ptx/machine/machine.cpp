#include "machine.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace ptx {

namespace {

constexpr uint64_t kUnset = 0xdeadbeefdeadbeefull;  // what registers begin with
constexpr uint8_t kUnsetByte = 0xcd;                // and shared memory
constexpr uint64_t kSector = 32, kLine = 128;
constexpr int kStartedOutOfOrder = 16;

std::string described(const char* what, int bytes, uint64_t address) {
    char text[160];
    std::snprintf(text, sizeof text, "%s of %d bytes at 0x%llx", what, bytes, static_cast<unsigned long long>(address));
    return text;
}

}  // namespace

Block::Block(int number, int multiprocessor, int warp_count, int shared_bytes, int registers)
    : number(number),
      multiprocessor(multiprocessor),
      warps(warp_count),
      shared(shared_bytes, kUnsetByte),
      order(number, warp_count * kLanes),
      alive(warp_count * kLanes) {
    for (int i = 0; i < warp_count; ++i) {
        warps[i].block = this;
        warps[i].number = i;
        warps[i].registers.assign(size_t(registers) * kLanes, kUnset);
    }
}

Machine::Machine(const Program& program, const Launch& launch, const uint8_t* parameters, const Region* regions,
                 int count, const Latencies& latencies)
    : program_(program),
      launch_(launch),
      parameters_(parameters),
      regions_(regions, regions + count),
      random_(launch.seed),
      l1_(launch.multiprocessors),
      executed_(program.instructions.size(), 0),
      clock_(latencies, launch.warps, program.registers, int(program.instructions.size())) {
    std::sort(regions_.begin(), regions_.end(), [](const Region& a, const Region& b) { return a.address < b.address; });
}

void Machine::start(int number) {
    blocks_.push_back(std::make_unique<Block>(number, number % launch_.multiprocessors, launch_.warps,
                                              launch_.shared_bytes, program_.registers));
}

void Machine::run() {
    if (launch_.is_timed) {
        run_by_the_clock();
    } else {
        run_at_random();
    }
    outcome_.races = int32_t(races_.size());
    outcome_.issued = clock_.issued();
    outcome_.cycles = clock_.end();
}

void Machine::run_at_random() {
    std::vector<int> order(launch_.programs);
    for (int i = 0; i < launch_.programs; ++i) order[i] = i;
    for (int i = 0; i + 1 < launch_.programs; ++i) {  // a device starts them about in order
        std::swap(order[i], order[i + int(random_() % std::min(launch_.programs - i, kStartedOutOfOrder))]);
    }
    int next = 0;
    while (next < launch_.programs && int(blocks_.size()) < launch_.resident) start(order[next++]);
    while (!blocks_.empty()) {
        const size_t chosen = random_() % blocks_.size();
        Block& block = *blocks_[chosen];
        const int first = int(random_() % launch_.warps);
        bool moved = false;
        for (int k = 0; k < launch_.warps && !moved; ++k) {
            Warp& warp = block.warps[(first + k) % launch_.warps];
            for (int left = 1 + int(random_() % launch_.quantum); left > 0 && step(warp); --left) moved = true;
        }
        release_barrier(block);
        if (block.alive == 0) {
            blocks_.erase(blocks_.begin() + chosen);
            if (next < launch_.programs) start(order[next++]);
        }
        if (outcome_.steps > launch_.most_steps) throw Fault("does not end: too many steps");
    }
}

void Machine::run_by_the_clock() {
    if (launch_.programs != 1) throw Fault("the clock is that of one program");
    start(0);
    Block& block = *blocks_[0];
    while (block.alive > 0) {
        Warp* chosen = nullptr;
        double earliest = 0;
        for (Warp& warp : block.warps) {
            if ((warp.alive & ~warp.waiting) == 0) continue;
            uint32_t group;
            const double time = clock_.earliest(warp.number, next_of(warp, group));
            if (chosen == nullptr || time < earliest) chosen = &warp, earliest = time;
        }
        if (chosen != nullptr) {
            uint32_t group;
            const Instruction& instruction = next_of(*chosen, group);
            lines_.clear();
            step(*chosen);
            clock_.issue(chosen->number, instruction, int(lines_.size()));
        }
        release_barrier(block);
        if (outcome_.steps > launch_.most_steps) throw Fault("does not end: too many steps");
    }
}

// The instruction of those of a warp's lanes that are behind the others, which so catch up where they diverged.
const Instruction& Machine::next_of(const Warp& warp, uint32_t& group) const {
    const uint32_t able = warp.alive & ~warp.waiting;
    int pc = int(program_.instructions.size());
    for (int lane = 0; lane < kLanes; ++lane) {
        if (able >> lane & 1) pc = std::min(pc, warp.pcs[lane]);
    }
    if (pc >= int(program_.instructions.size())) throw Fault("runs past the kernel's end");
    group = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        if ((able >> lane & 1) && warp.pcs[lane] == pc) group |= 1u << lane;
    }
    return program_.instructions[pc];
}

bool Machine::step(Warp& warp) {
    if ((warp.alive & ~warp.waiting) == 0) return false;
    uint32_t group;
    const Instruction& instruction = next_of(warp, group);
    ++outcome_.steps;
    ++executed_[instruction.pc];
    uint32_t active = group;
    if (instruction.guard >= 0) {
        const uint64_t* guard = warp.row(instruction.guard);
        for (int lane = 0; lane < kLanes; ++lane) {
            if ((guard[lane] & 1) == uint64_t(instruction.guard_negated)) active &= ~(1u << lane);
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        if (group >> lane & 1) warp.pcs[lane] = instruction.pc + 1;
    }
    try {
        if (instruction.is_collective && active != warp.alive) throw Fault("a warp's lanes do not all take part");
        if (active != 0) instruction.execute(*this, warp, instruction, active);
    } catch (const Fault& fault) {
        char where[120];
        std::snprintf(where, sizeof where, " [instruction %d, program %d, warp %d]", instruction.pc, warp.block->number,
                      warp.number);
        throw Fault(fault.what() + std::string(where));
    }
    return true;
}

void Machine::arrive(Warp& warp, const Instruction& instruction, uint32_t active) {
    Block& block = *warp.block;
    if (active != warp.alive) throw Fault("a warp's lanes do not all reach the barrier");
    if (block.arrived > 0 && block.barrier_pc != instruction.pc) {
        throw Fault("threads meet at different barriers, this one and instruction " + std::to_string(block.barrier_pc));
    }
    block.barrier_pc = instruction.pc;
    warp.waiting |= active;
    block.arrived += __builtin_popcount(active);
}

void Machine::release_barrier(Block& block) {
    if (block.arrived == 0 || block.arrived != block.alive) return;
    block.arrived = 0;
    for (Warp& warp : block.warps) warp.waiting = 0;
    block.order.barrier();
    ++outcome_.barriers;
    if (launch_.is_timed) clock_.barrier();
}

void Machine::meet(Warp& warp, uint32_t active) {
    if (active != warp.alive) throw Fault("a warp's lanes do not all reach its barrier");
    warp.block->order.warp_barrier(warp.number);
}

void Machine::leave(Warp& warp, uint32_t active) {
    warp.alive &= ~active;
    warp.block->alive -= __builtin_popcount(active);
}

bool Machine::is_mapped(uint64_t address, int bytes) const {
    const auto holds = [&](const Region& region) {
        return address >= region.address && address + bytes <= region.address + region.bytes;
    };
    if (last_region_ < regions_.size() && holds(regions_[last_region_])) return true;
    const auto after = std::upper_bound(regions_.begin(), regions_.end(), address,
                                        [](uint64_t at, const Region& region) { return at < region.address; });
    if (after == regions_.begin() || !holds(*(after - 1))) return false;
    last_region_ = size_t(after - regions_.begin()) - 1;
    return true;
}

void Machine::require(uint64_t address, int bytes, const char* what) const {
    if (!is_mapped(address, bytes)) throw Fault("out of bounds: " + described(what, bytes, address));
    if (address % bytes != 0) throw Fault("misaligned: " + described(what, bytes, address));
}

void Machine::touch(Shadow& shadow, bool is_shared, Warp& warp, int lane, const Instruction& instruction,
                    uint64_t address, int bytes, bool is_write, bool is_same, bool is_atomic) {
    if (!launch_.detects_races) return;
    const BlockOrder& order = warp.block->order;
    const int thread = warp.thread(lane);
    const Access access{order.block, order.epoch, order.clocks[thread], instruction.pc, int16_t(thread), 0,
                        is_write,    is_atomic};
    shadow.touch(address, bytes, is_same, access, order, [&](const Access& other, int kind) {
        const bool same_block = other.block == access.block;
        const bool same_warp = same_block && other.thread / kLanes == thread / kLanes;
        const auto key = std::make_tuple(other.pc, access.pc, kind, same_block + same_warp);
        const auto [found, is_new] = race_numbers_.try_emplace(key, races_.size());
        if (is_new) {
            races_.push_back({other.pc, access.pc, kind, same_block, same_warp, is_shared, int64_t(address), 0});
        }
        ++races_[found->second].count;
    });
}

void Machine::count_line(uint64_t line) {
    if (launch_.is_timed && std::find(lines_.begin(), lines_.end(), line) == lines_.end()) lines_.push_back(line);
}

void Machine::read(Warp& warp, int lane, const Instruction& instruction, uint64_t address, int bytes, uint8_t* into) {
    require(address, bytes, "read");
    touch(shadow_, false, warp, lane, instruction, address, bytes, false, false, false);
    count_line(address / kLine);
    const uint8_t* memory = reinterpret_cast<const uint8_t*>(address);
    if (!launch_.has_l1 || instruction.past_l1) {
        std::memcpy(into, memory, bytes);
        return;
    }
    const uint64_t base = address / kSector * kSector;
    const auto [sector, is_new] = l1_[warp.block->multiprocessor].try_emplace(base);
    if (is_new) {
        for (uint64_t i = 0; i < kSector; ++i) {  // as much of the sector as is there
            if (is_mapped(base + i, 1)) sector->second[i] = *reinterpret_cast<const uint8_t*>(base + i);
        }
    }
    outcome_.stale_reads += std::memcmp(&sector->second[address - base], memory, bytes) != 0;
    std::memcpy(into, &sector->second[address - base], bytes);
}

void Machine::write(Warp& warp, int lane, const Instruction& instruction, uint64_t address, int bytes,
                    const uint8_t* from) {
    require(address, bytes, "write");
    uint8_t* memory = reinterpret_cast<uint8_t*>(address);
    const bool is_same = std::memcmp(memory, from, bytes) == 0;
    touch(shadow_, false, warp, lane, instruction, address, bytes, true, is_same, false);
    count_line(address / kLine);
    std::memcpy(memory, from, bytes);
    auto& l1 = l1_[warp.block->multiprocessor];
    const auto sector = l1.find(address / kSector * kSector);
    if (sector != l1.end()) std::memcpy(&sector->second[address % kSector], from, bytes);
}

void Machine::read_shared(Warp& warp, int lane, const Instruction& instruction, uint64_t address, int bytes,
                          uint8_t* into) {
    Block& block = *warp.block;
    if (address + bytes > block.shared.size())
        throw Fault(described("out of bounds: read of shared memory", bytes, address));
    touch(block.shared_shadow, true, warp, lane, instruction, address, bytes, false, false, false);
    count_line(address / kLine);
    std::memcpy(into, &block.shared[address], bytes);
}

void Machine::write_shared(Warp& warp, int lane, const Instruction& instruction, uint64_t address, int bytes,
                           const uint8_t* from) {
    Block& block = *warp.block;
    if (address + bytes > block.shared.size())
        throw Fault(described("out of bounds: write of shared memory", bytes, address));
    const bool is_same = std::memcmp(&block.shared[address], from, bytes) == 0;
    touch(block.shared_shadow, true, warp, lane, instruction, address, bytes, true, is_same, false);
    count_line(address / kLine);
    std::memcpy(&block.shared[address], from, bytes);
}

uint32_t Machine::add_atomically(Warp& warp, int lane, const Instruction& instruction, uint64_t address,
                                 uint32_t value) {
    require(address, 4, "atomic");
    BlockOrder& order = warp.block->order;
    const int thread = warp.thread(lane);
    const bool orders = instruction.mode != 0;  // acquires and releases
    Knowledge& published = published_[address];
    if (orders) order.acquire(thread, published);
    touch(shadow_, false, warp, lane, instruction, address, 4, true, false, true);
    if (orders) {
        published.join(order.released(thread));
        l1_[warp.block->multiprocessor].clear();
    }
    uint32_t* memory = reinterpret_cast<uint32_t*>(address);
    const uint32_t before = *memory;
    *memory = before + value;
    return before;
}

}  // namespace ptx
