// A kernel as the parser hands it over, and as the machine executes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kMostDestinations = 8;
constexpr int kMostSources = 24;

// What an operand is: a register's number, or that of a constant.
struct Operand {
    int32_t is_constant;
    int32_t number;
};

// One instruction in syntax alone; ctypes fills it in.
struct Syntax {
    int32_t opcode;  // index into the program's opcodes
    int32_t guard;   // predicate register, or -1
    int32_t guard_negated;
    int32_t target;  // of a branch: an instruction's number
    int64_t offset;  // of an address, in bytes
    int32_t destinations;
    int32_t sources;
    int32_t destination[kMostDestinations];  // registers, or -1 where the value is thrown away
    Operand source[kMostSources];
};

struct Warp;
struct Instruction;
class Machine;
using Execute = void (*)(Machine&, Warp&, const Instruction&, uint32_t active);

// What an instruction waits for and keeps busy, for the latency model.
enum class Unit : uint8_t {
    kInteger,
    kFloat64,
    kDivision,
    kSpecial,
    kMatrix,
    kShuffle,
    kShared,
    kGlobal,
    kGlobalPast1,
    kAtomic,
    kBarrier,
    kControl
};

// An instruction with its meaning.
struct Instruction : Syntax {
    Execute execute = nullptr;
    int pc = 0;
    int bytes = 0;     // of one element that a memory operation moves
    int elements = 1;  // of a vector
    bool is_signed = false;
    bool past_l1 = false;
    int mode = 0;  // how to round, to compare, to shuffle; the opcode's own matter
    Unit unit = Unit::kInteger;
    bool is_memory = false;      // its first source is an address
    bool is_free = false;        // the assembler leaves nothing of it
    bool is_collective = false;  // all of a warp's lanes take part
};

struct Program {
    std::vector<Instruction> instructions;
    std::vector<uint64_t> constants;  // kLanes copies each, so that a constant reads as a register does
    int registers = 0;
};

// Fills in what an opcode means; throws std::invalid_argument where the machine does not know it.
void decode(const std::string& opcode, Instruction& instruction);

// Marks as free what the assembler makes an address's offset: a constant added to what nothing but addresses uses.
void fold_offsets(Program& program);

}  // namespace ptx
