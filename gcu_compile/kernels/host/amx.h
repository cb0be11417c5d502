// Tiles of AMX: registers of 16 rows of 64 bytes, and products of them. Included where a build may use them
// (__AMX_TILE__); the process must have asked the kernel of the operating system for them (`build.py` does).
//
//   tile C [16 x 16] += A [16 rows x 64 bytes] B [16 rows x 64 bytes]
//   A: a row is 32 bf16 or 64 int8 inputs of one row of x
//   B: row s is, for each of 16 outputs, the 2 (bf16) or 4 (int8) inputs that start at 2 s or 4 s
// so B is a slice of the weights' tiles as they lie, and A a slice of the rows of x.
#pragma once

#if defined(__AMX_TILE__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace amx {

// What ldtilecfg reads. GCC 12's `_tile_loadconfig` names only the first 8 bytes of it as its operand, so that the
// compiler drops the stores to the rest; `load` below names all 64.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row, for each tile
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64);

inline void load(const Config& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
inline void release() { asm volatile("tilerelease"); }

// Behind an instruction of tiles: where another thread shares the core (a hypervisor does not tell), those that follow
// each other at once take half as long again as those with a few others between them. Where none does, it costs nothing.
inline void pause() { asm volatile("nop; nop; nop; nop; nop; nop; nop; nop"); }

// Loads of tiles do not tell the compiler which memory they read: this does, between stores and loads of what they stored.
inline void fence() { asm volatile("" : : : "memory"); }

// Eight tiles of 64 bytes a row for as long as it lives, in the thread that made it. 0..3 hold sums and 4, 5 what is
// multiplied, of `rows` rows; 6 and 7 hold what it is multiplied with, of 16.
class Tiles {
 public:
  explicit Tiles(int rows = 16) {
    Config config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = uint8_t(i < 6 ? rows : 16);
    load(config);
  }
  ~Tiles() { release(); }
  Tiles(const Tiles&) = delete;
};

}  // namespace amx

#endif
