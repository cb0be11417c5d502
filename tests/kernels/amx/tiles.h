// AMX's tiles in memory, and what its instructions do to them (Intel's Software Developer's Manual, volume 2, and the
// exception classes AMX-E1 to E4). Where a CPU would fault, the process ends with a message that names the tiles: a CPU
// that has AMX does not say more than "illegal instruction".
#pragma once

#include <immintrin.h>
#include <unistd.h>

#include <bit>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

constexpr int TILES = 8, ROWS = 16, LINE = 64;  // of palette 1

inline int errors = 2;  // the file that faults are told to: a test runner may have taken standard error

[[noreturn, gnu::format(printf, 2, 3)]] inline void fault(const char* instruction, const char* format, ...) {
  char text[512];
  int n = std::snprintf(text, sizeof text, "AMX emulation: %s: ", instruction);
  va_list values;
  va_start(values, format);
  n += std::vsnprintf(text + n, sizeof text - n - 1, format, values);
  va_end(values);
  n = n < int(sizeof text) - 2 ? n : int(sizeof text) - 2;
  text[n++] = '\n';
  [[maybe_unused]] auto written = write(errors, text, n);
  std::abort();
}

// Arithmetic as TDPBF16PS has it, whatever the thread has set: to nearest even, denormals are zeros on both sides, no
// exceptions.
class Rounding {
 public:
  Rounding() : before_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
  ~Rounding() { _mm_setcsr(before_); }
  Rounding(const Rounding&) = delete;

 private:
  unsigned before_;
};

enum Type { BF16, SS, SU, US, UU };  // of a product: the signs are those of its left operand and its right one
inline const char* const PRODUCTS[] = {"tdpbf16ps", "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud"};

// What ldtilecfg reads.
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row, for each tile
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

// The tiles of a thread.
class Tiles {
 public:
  void configure(const void* from) {
    Config c;
    std::memcpy(&c, from, sizeof c);
    if (c.palette > 1) fault("ldtilecfg", "palette %d is not known", c.palette);
    if (c.palette == 0) return release();
    if (c.start_row >= ROWS) fault("ldtilecfg", "start_row is %d of %d rows", c.start_row, ROWS);
    for (uint8_t byte : c.reserved)
      if (byte) fault("ldtilecfg", "reserved bytes are not zero");
    for (int t = 0; t < 16; ++t) {
      if (t >= TILES && (c.rows[t] || c.bytes[t])) fault("ldtilecfg", "palette 1 has no tmm%d", t);
      if (c.rows[t] > ROWS || c.bytes[t] > LINE || !c.rows[t] != !c.bytes[t])
        fault("ldtilecfg", "tmm%d cannot have %d rows of %d bytes", t, c.rows[t], c.bytes[t]);
    }
    config_ = c;
    std::memset(data_, 0, sizeof data_);
  }

  void config(void* to) const { std::memcpy(to, &config_, sizeof config_); }

  void release() {
    config_ = {};
    std::memset(data_, 0, sizeof data_);
  }

  void zero(int t) {
    check("tilezero", t);
    std::memset(data_[t], 0, sizeof data_[t]);
    config_.start_row = 0;
  }

  void load(int t, const void* from, int64_t stride) {
    check("tileloadd", t, true);
    auto* p = static_cast<const char*>(from);
    for (int r = config_.start_row; r < config_.rows[t]; ++r) {
      std::memcpy(data_[t][r], p + r * stride, config_.bytes[t]);
      std::memset(data_[t][r] + config_.bytes[t], 0, LINE - config_.bytes[t]);
    }
    std::memset(data_[t][0] + config_.rows[t] * LINE, 0, (ROWS - config_.rows[t]) * LINE);
    config_.start_row = 0;
  }

  void store(int t, void* to, int64_t stride) {
    check("tilestored", t, true);
    auto* p = static_cast<char*>(to);
    for (int r = config_.start_row; r < config_.rows[t]; ++r)
      std::memcpy(p + r * stride, data_[t][r], config_.bytes[t]);
    config_.start_row = 0;
  }

  // c += a b. Not inlined: the compiler does not know that arithmetic depends on `Rounding`.
  [[gnu::noinline]] void multiply(Type type, int c, int a, int b) {
    for (int t : {c, a, b}) check(PRODUCTS[type], t);
    const int rows = config_.rows[c], words = config_.bytes[a] / 4, columns = config_.bytes[c] / 4;
    if (c == a || a == b || c == b || config_.bytes[c] % 4 || config_.bytes[a] % 4 || rows != config_.rows[a] ||
        config_.bytes[c] != config_.bytes[b] || words != config_.rows[b])
      fault(PRODUCTS[type], "tmm%d [%d rows of %d bytes] += tmm%d [%d of %d] tmm%d [%d of %d]", c, rows,
            config_.bytes[c], a, config_.rows[a], config_.bytes[a], b, config_.rows[b], config_.bytes[b]);
    for (int r = 0; r < rows; ++r) {
      uint32_t sums[COLUMNS] = {}, x[COLUMNS];
      std::memcpy(x, data_[a][r], sizeof x);
      std::memcpy(sums, data_[c][r], sizeof sums);
      switch (type) {
        case BF16: floats(sums, x, data_[b], words); break;
        case SS: whole<int8_t, int8_t>(sums, x, data_[b], words); break;
        case SU: whole<int8_t, uint8_t>(sums, x, data_[b], words); break;
        case US: whole<uint8_t, int8_t>(sums, x, data_[b], words); break;
        case UU: whole<uint8_t, uint8_t>(sums, x, data_[b], words); break;
      }
      std::memcpy(data_[c][r], sums, columns * 4);
    }
  }

 private:
  static constexpr int COLUMNS = LINE / 4;

  void check(const char* instruction, int t, bool starts = false) const {
    if (config_.palette == 0) fault(instruction, "tmm%d is used, and no tiles are configured in this thread", t);
    if (t >= TILES) fault(instruction, "palette 1 has no tmm%d", t);
    if (config_.rows[t] == 0) fault(instruction, "tmm%d is not configured", t);
    if (!starts && config_.start_row) fault(instruction, "tmm%d is used, and start_row is %d", t, config_.start_row);
  }

  // One row. The products of even inputs and those of odd ones have sums of their own, from zero, which are added in
  // the end: so the manual has it.
  static void floats(uint32_t* sums, const uint32_t* x, const char (*b)[LINE], int words) {
    float even[COLUMNS] = {}, odd[COLUMNS] = {};
    for (int k = 0; k < words; ++k) {
      uint32_t y[COLUMNS];
      std::memcpy(y, b[k], sizeof y);
      const float low = std::bit_cast<float>(x[k] << 16), high = std::bit_cast<float>(x[k] & 0xffff0000);
      for (int n = 0; n < COLUMNS; ++n) {
        even[n] = __builtin_fmaf(low, std::bit_cast<float>(y[n] << 16), even[n]);
        odd[n] = __builtin_fmaf(high, std::bit_cast<float>(y[n] & 0xffff0000), odd[n]);
      }
    }
    for (int n = 0; n < COLUMNS; ++n)
      sums[n] = std::bit_cast<uint32_t>(std::bit_cast<float>(sums[n]) + (even[n] + odd[n]));
  }

  // One row; sums wrap around.
  template <class X, class Y>
  static void whole(uint32_t* sums, const uint32_t* x, const char (*b)[LINE], int words) {
    for (int k = 0; k < words; ++k) {
      uint32_t y[COLUMNS];
      std::memcpy(y, b[k], sizeof y);
      for (int byte = 0; byte < 32; byte += 8)
        for (int n = 0; n < COLUMNS; ++n) sums[n] += int32_t(X(x[k] >> byte)) * int32_t(Y(y[n] >> byte));
    }
  }

  Config config_ = {};
  alignas(64) char data_[TILES][ROWS][LINE] = {};
};

}  // namespace emulated
