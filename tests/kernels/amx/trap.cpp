// Runs code that was compiled for AMX on a CPU that has none: its tile instructions are illegal there, and the signal's
// handler does what they would do, with the registers and the memory of the thread that met one. So the very libraries
// that a machine with AMX runs are tested, and what the compiler made of their loads, stores and fences.
#include <atomic>
#include <csignal>
#include <ucontext.h>

#include "tiles.h"

namespace {

using emulated::Tiles;

thread_local Tiles tiles;
std::atomic<int64_t> executed;
struct sigaction before;
int running;  // emulations that were begun and not ended

constexpr int REGISTERS[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
enum Prefix { NONE, P66, PF3, PF2 };  // the last two bits of a VEX prefix

int32_t displacement(const uint8_t* at) {
  int32_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// An operand in memory.
struct Memory {
  uint8_t* at;
  int64_t stride;     // the index, where the instruction has one
  const uint8_t* end;  // of the instruction
  bool indexed;
};

Memory memory(const uint8_t* code, bool x, bool b, const greg_t* registers) {
  const int mod = code[0] >> 6, low = code[0] & 7;
  Memory found{nullptr, 0, code + 1, low == 4};
  int64_t base = 0;
  bool wide = mod == 2;  // of the displacement
  if (found.indexed) {
    const int sib = *found.end++, index = (sib >> 3 & 7) | x << 3;
    if (index != 4) found.stride = registers[REGISTERS[index]] << (sib >> 6);
    if (mod == 0 && (sib & 7) == 5)
      wide = true;
    else
      base = registers[REGISTERS[(sib & 7) | b << 3]];
  } else if (mod == 0 && low == 5) {
    wide = true;
    base = int64_t(code + 5);  // the next instruction
  } else {
    base = registers[REGISTERS[low | b << 3]];
  }
  if (wide) base += displacement(found.end), found.end += 4;
  if (mod == 1) base += int8_t(*found.end++);
  found.at = reinterpret_cast<uint8_t*>(base);
  return found;
}

// Does what the instruction at `code` does, and gives where the next one begins; null if it is none of AMX's.
const uint8_t* execute(const uint8_t* code, const greg_t* registers) {
  // VEX prefix of three bytes, map 0F38, W = 0, 128 bits.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return nullptr;
  const bool r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20);
  const int prefix = code[2] & 3, third = ~code[2] >> 3 & 15, opcode = code[3], modrm = code[4];
  const int reg = (modrm >> 3 & 7) | r << 3, rm = (modrm & 7) | b << 3;
  const bool in_registers = modrm >> 6 == 3;
  switch (opcode) {
    case 0x49:
      if (in_registers && prefix == NONE && modrm == 0xc0) return tiles.release(), code + 5;
      if (in_registers && prefix == PF2 && rm == 0) return tiles.zero(reg), code + 5;
      if (in_registers || reg != 0 || prefix > P66) return nullptr;
      {
        const Memory at = memory(code + 4, x, b, registers);
        const int64_t index = at.indexed ? at.stride : 0;  // of an ordinary address
        prefix == NONE ? tiles.configure(at.at + index) : tiles.config(at.at + index);
        return at.end;
      }
    case 0x4b:
      if (in_registers || prefix == NONE) return nullptr;
      {
        const Memory at = memory(code + 4, x, b, registers);
        if (!at.indexed) return nullptr;
        prefix == PF3 ? tiles.store(reg, at.at, at.stride) : tiles.load(reg, at.at, at.stride);
        return at.end;
      }
    case 0x5c:
      if (!in_registers || prefix != PF3) return nullptr;
      return tiles.multiply(emulated::BF16, reg, rm, third), code + 5;
    case 0x5e: {
      if (!in_registers) return nullptr;
      constexpr emulated::Type TYPES[] = {emulated::UU, emulated::US, emulated::SU, emulated::SS};
      return tiles.multiply(TYPES[prefix], reg, rm, third), code + 5;
    }
  }
  return nullptr;
}

void illegal(int, siginfo_t*, void* context) {
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const emulated::Rounding rounding;
  auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  int count = 0;
  // To be here costs as much as many products: those that follow at once, or behind a pause, are done, too.
  while (auto* next = execute(code, registers)) {
    for (code = next; *code == 0x90;) ++code;
    ++count;
  }
  if (!count) {  // an illegal instruction of another kind is met again, without us
    sigaction(SIGILL, &before, nullptr);
    return;
  }
  executed += count;
  registers[REG_RIP] = reinterpret_cast<greg_t>(code);
}

}  // namespace

// Begins the emulation, in all threads; faults are told to the file `errors` until it ends. Each is ended by a call of
// its own, with what this returned: the file of the emulation around it.
extern "C" int amx_begin(int errors) {
  const int around = emulated::errors;
  emulated::errors = errors;
  if (running++) return around;
  struct sigaction ours = {};
  ours.sa_sigaction = illegal;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &ours, &before);
  return around;
}

extern "C" void amx_end(int around) {
  emulated::errors = around;
  if (--running == 0) sigaction(SIGILL, &before, nullptr);
}

// Instructions that were executed since the library was loaded.
extern "C" int64_t amx_executed() { return executed; }

// One product, as `product` of instructions.cpp makes it, without an instruction of AMX.
extern "C" void amx_product(const void* config, int type, const void* a, int64_t a_stride, const void* b,
                            int64_t b_stride, void* c, int64_t c_stride) {
  const emulated::Rounding rounding;
  Tiles mine;
  mine.configure(config);
  mine.load(0, c, c_stride);
  mine.load(1, a, a_stride);
  mine.load(2, b, b_stride);
  mine.multiply(emulated::Type(type), 0, 1, 2);
  mine.store(0, c, c_stride);
}
