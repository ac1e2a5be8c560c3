// The machine for ctypes: plain functions, plain structs, errors as text.

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "machine.hpp"

namespace {

thread_local std::string last_error;

struct Handle {
    ptx::Program program;
    std::vector<ptx::Race> races;
    std::vector<uint64_t> executed;
    std::vector<double> spent;
};

}  // namespace

extern "C" {

const char* ptx_error() { return last_error.c_str(); }

// A program of `count` instructions, or null; see ptx_error.
Handle* ptx_load(const ptx::Syntax* syntax, int count, const char* const* opcodes, const uint64_t* constants,
                 int constant_count, int registers) {
    auto handle = std::make_unique<Handle>();
    ptx::Program& program = handle->program;
    program.registers = registers;
    for (int k = 0; k < constant_count; ++k)
        program.constants.insert(program.constants.end(), ptx::kLanes, constants[k]);
    for (int k = 0; k < count; ++k) {
        ptx::Instruction instruction;
        static_cast<ptx::Syntax&>(instruction) = syntax[k];
        instruction.pc = k;
        try {
            ptx::decode(opcodes[syntax[k].opcode], instruction);
        } catch (const std::invalid_argument& error) {
            last_error = std::string(opcodes[syntax[k].opcode]) + ": " + error.what();
            return nullptr;
        }
        program.instructions.push_back(instruction);
    }
    ptx::fold_offsets(program);
    return handle.release();
}

void ptx_free(Handle* handle) { delete handle; }

// 0, or 1 where the kernel did what no kernel may; see ptx_error. The outcome is filled in as far as it got.
int ptx_run(Handle* handle, const ptx::Launch* launch, const uint8_t* parameters, const ptx::Region* regions, int count,
            const ptx::Latencies* latencies, ptx::Outcome* outcome) {
    ptx::Machine machine(handle->program, *launch, parameters, regions, count, *latencies);
    int status = 0;
    try {
        machine.run();
    } catch (const ptx::Fault& fault) {
        last_error = fault.what();
        status = 1;
    }
    *outcome = machine.outcome();
    handle->races = machine.races();
    outcome->races = int32_t(handle->races.size());
    handle->executed = machine.executed();
    handle->spent = machine.spent();
    return status;
}

// Of the last run: its races, how often each instruction was executed, and, by the clock, its cycles in the first warp.
void ptx_races(const Handle* handle, ptx::Race* into) { std::copy(handle->races.begin(), handle->races.end(), into); }
void ptx_executed(const Handle* handle, uint64_t* into) {
    std::copy(handle->executed.begin(), handle->executed.end(), into);
}
void ptx_spent(const Handle* handle, double* into) { std::copy(handle->spent.begin(), handle->spent.end(), into); }
}
