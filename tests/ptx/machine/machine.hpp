// Programs of warps on a few multiprocessors: warps in lockstep, one of them chosen at random at a time.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "clock.hpp"
#include "program.hpp"
#include "races.hpp"

namespace ptx {

// Memory that the kernel may touch; ctypes fills it in.
struct Region {
    uint64_t address, bytes;
};

// How a kernel is launched and how the machine goes about it; ctypes fills it in.
struct Launch {
    int32_t programs, warps, shared_bytes, parameter_bytes;
    int32_t resident;  // programs at a time
    int32_t multiprocessors;
    int32_t quantum;  // most instructions of a warp in a row
    int32_t detects_races, has_l1, is_timed;
    uint64_t seed, most_steps;
};

// What came of it; ctypes reads it.
struct Outcome {
    uint64_t steps, barriers, stale_reads, issued;
    double cycles;
    int32_t races;
};

// The kernel did what no kernel may.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Block;

struct Warp {
    Block* block = nullptr;
    int number = 0;
    uint32_t alive = kAllLanes, waiting = 0;
    std::vector<int> pcs = std::vector<int>(kLanes, 0);
    std::vector<uint64_t> registers;  // kLanes a register

    int thread(int lane) const { return number * kLanes + lane; }
    uint64_t* row(int reg) { return &registers[size_t(reg) * kLanes]; }
};

struct Block {
    int number, multiprocessor;
    std::vector<Warp> warps;
    std::vector<uint8_t> shared;
    Shadow shared_shadow;
    BlockOrder order;
    int alive, arrived = 0, barrier_pc = -1;

    Block(int number, int multiprocessor, int warp_count, int shared_bytes, int registers);
};

class Machine {
 public:
    Machine(const Program& program, const Launch& launch, const uint8_t* parameters, const Region* regions, int count,
            const Latencies& latencies);
    void run();

    const Outcome& outcome() const { return outcome_; }
    const std::vector<Race>& races() const { return races_; }
    const std::vector<uint64_t>& executed() const { return executed_; }
    const std::vector<double>& spent() const { return clock_.spent(); }

    // For instructions.
    const uint64_t* source(Warp& warp, const Instruction& instruction, int k) const {
        const Operand& operand = instruction.source[k];
        return operand.is_constant ? &program_.constants[size_t(operand.number) * kLanes] : warp.row(operand.number);
    }
    const Launch& launch() const { return launch_; }
    const uint8_t* parameters() const { return parameters_; }
    void read(Warp& warp, int lane, const Instruction& instruction, uint64_t address, int bytes, uint8_t* into);
    void write(Warp& warp, int lane, const Instruction& instruction, uint64_t address, int bytes, const uint8_t* from);
    void read_shared(Warp& warp, int lane, const Instruction& instruction, uint64_t address, int bytes, uint8_t* into);
    void write_shared(Warp& warp, int lane, const Instruction& instruction, uint64_t address, int bytes,
                      const uint8_t* from);
    uint32_t add_atomically(Warp& warp, int lane, const Instruction& instruction, uint64_t address, uint32_t value);
    void arrive(Warp& warp, const Instruction& instruction, uint32_t active);
    void meet(Warp& warp, uint32_t active);
    void leave(Warp& warp, uint32_t active);

 private:
    void start(int number);
    bool step(Warp& warp);
    const Instruction& next_of(const Warp& warp, uint32_t& group) const;
    void release_barrier(Block& block);
    void run_at_random();
    void run_by_the_clock();
    bool is_mapped(uint64_t address, int bytes) const;
    void require(uint64_t address, int bytes, const char* what) const;
    void touch(Shadow& shadow, bool is_shared, Warp& warp, int lane, const Instruction& instruction, uint64_t address,
               int bytes, bool is_write, bool is_same, bool is_atomic);
    void count_line(uint64_t line);

    const Program& program_;
    const Launch launch_;
    const uint8_t* parameters_;
    std::vector<Region> regions_;
    mutable size_t last_region_ = 0;
    std::mt19937_64 random_;
    std::vector<std::unique_ptr<Block>> blocks_;
    std::vector<std::unordered_map<uint64_t, std::array<uint8_t, 32>>> l1_;  // a multiprocessor: its sectors
    Shadow shadow_;
    std::unordered_map<uint64_t, Knowledge> published_;  // an atomic's address: what its releases told
    std::map<std::tuple<int, int, int, int>, size_t> race_numbers_;
    std::vector<Race> races_;
    std::vector<uint64_t> executed_;
    Clock clock_;
    std::vector<uint64_t> lines_;  // of memory, that the instruction touches
    Outcome outcome_{};
};

}  // namespace ptx
