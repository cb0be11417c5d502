// Norm and rotation of q and k, and the write of k and v into a paged cache; see attention/rope.py for the meaning.
//
//   token (in parallel) -> head -> float32 in L1 -> norm -> rotation -> q out, or quantised into the cache

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };
constexpr int64_t LARGEST_HEAD = 1024;
constexpr int64_t WAKE = 512;  // fewer heads take less time than waking other threads
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
}  // namespace

struct Strides {
  int64_t block, head, slot;
};

// The cache of k or v.
struct Side {
  int64_t size;  // of a head
  void* cache;
  Strides at;
  const float* scale;   // `scales` of them: 1 or kv_heads; null: a float cache, or scales that are computed
  const int32_t* zero;  // as many, or null
  int64_t scales;
  float* scale_cache;   // written; or null
  Strides scale_at;
};

// 8 bytes a field, in the order of `FIELDS` in host/rope.py.
struct Arguments {
  // What changes from step to step. kernels/attention/layer.py writes this part anew and keeps the rest of a layer.
  const void* q;  // [tokens, heads, head_dim], `q_stride` from token to token; null: none
  void* q_out;    // contiguous
  int64_t q_stride;
  const void* k_from;
  int64_t k_stride;
  const void* v_from;
  int64_t v_stride;
  int64_t tokens;
  const int64_t *positions, *slots;  // positions: null: row t is token t
  int64_t threads;
  const float *q_norm, *k_norm;
  // What a layer keeps.
  int64_t heads, kv_heads;
  Side k, v;
  const void* cos_sin;  // [rows, rotary], `cos_sin_stride` from row to row
  int64_t cos_sin_stride, rows, rotary, block_size, slot_count;
  double eps;
  int64_t interleaved, dtype, cache_dtype, cos_sin_dtype;
};

namespace {

void read(const void* from, int64_t at, int64_t n, int dtype, float* to) {
  if (dtype == F32) {
    std::memcpy(to, static_cast<const float*>(from) + at, n * 4);
  } else if (dtype == BF16) {
    const uint16_t* x = static_cast<const uint16_t*>(from) + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = std::bit_cast<float>(uint32_t(x[i]) << 16);
  } else {
    const _Float16* x = static_cast<const _Float16*>(from) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = float(x[i]);
  }
}

void write(void* to, int64_t at, int64_t n, int dtype, const float* from) {
  if (dtype == F32) {
    std::memcpy(static_cast<float*>(to) + at, from, n * 4);
  } else if (dtype == BF16) {
    uint16_t* x = static_cast<uint16_t*>(to) + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {  // to nearest, ties to even; NaN stays one
      uint32_t bits = std::bit_cast<uint32_t>(from[i]);
      uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
      x[i] = uint16_t(from[i] == from[i] ? rounded : (bits >> 16 | 64));
    }
  } else {
    _Float16* x = static_cast<_Float16*>(to) + at;
    for (int64_t i = 0; i < n; ++i) x[i] = _Float16(from[i]);
  }
}

void normalise(float* x, int64_t n, const float* weight, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  float factor = 1.0f / std::sqrt(sum / float(n) + eps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * factor * weight[i];
}

void rotate(float* x, const float* cos, const float* sin, int64_t half, bool interleaved) {
  if (interleaved) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i], x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i], x[i + half] = b * cos[i] + a * sin[i];
  }
}

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const uint16_t* p) {  // bfloat16
  return std::bit_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Bits) << 16);
}
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline void store(uint16_t* p, Vec x) {
#ifdef __AVX512BF16__
  *reinterpret_cast<Half*>(p) = std::bit_cast<Half>(_mm512_cvtneps_pbh(std::bit_cast<__m512>(x)));
#else
  Bits bits = std::bit_cast<Bits>(x), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  *reinterpret_cast<Half*>(p) = __builtin_convertvector(x == x ? rounded : (bits >> 16 | 64), Half);
#endif
}

// One head from `from` to `to` of the same dtype, rotated on the way; `half` is a multiple of LANES.
template <class T>
void rotate_through(const T* from, T* to, const float* cos, const float* sin, int64_t half, int64_t n) {
  for (int64_t i = 0; i < half; i += LANES) {
    Vec a = load(from + i), b = load(from + half + i), c = load(cos + i), s = load(sin + i);
    store(to + i, a * c - b * s), store(to + half + i, b * c + a * s);
  }
  if (2 * half < n) std::memcpy(to + 2 * half, from + 2 * half, (n - 2 * half) * sizeof(T));
}

// Whether the way of a head is `rotate_through`: rotation in halves, no norm, nothing to quantise or convert.
bool straight(const Arguments& in, const float* norm, int to_dtype) {
  return !norm && !in.interleaved && in.rotary / 2 % LANES == 0 && to_dtype == in.dtype && in.dtype != F16;
}

void through(const Arguments& in, const void* from, int64_t from_at, void* to, int64_t to_at, const float* row, int64_t n) {
  int64_t half = in.rotary / 2;
  if (in.dtype == F32)
    rotate_through(static_cast<const float*>(from) + from_at, static_cast<float*>(to) + to_at, row, row + half, half, n);
  else
    rotate_through(static_cast<const uint16_t*>(from) + from_at, static_cast<uint16_t*>(to) + to_at, row, row + half, half, n);
}

int64_t place(const Side& side, int64_t block, int64_t slot, int64_t head) {
  return block * side.at.block + head * side.at.head + slot * side.at.slot;
}

// One head of one token into its slot.
void keep(const Side& side, int dtype, int64_t block, int64_t slot, int64_t head, const float* x) {
  int64_t at = place(side, block, slot, head);
  if (dtype != I8) return write(side.cache, at, side.size, dtype, x);
  float scale, zero = 0;
  if (side.scale_cache) {
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < side.size; ++i) largest = std::max(largest, std::fabs(x[i]));
    scale = largest == 0 ? 1.0f : largest / 127;
    side.scale_cache[block * side.scale_at.block + head * side.scale_at.head + slot * side.scale_at.slot] = scale;
  } else {
    scale = side.scale[side.scales == 1 ? 0 : head];
    if (side.zero) zero = float(side.zero[side.scales == 1 ? 0 : head]);
  }
  int8_t* to = static_cast<int8_t*>(side.cache) + at;
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
#pragma omp simd
  for (int64_t i = 0; i < side.size; ++i) {
    float value = std::min(std::max(x[i] / scale + zero, -128.0f), 127.0f);
    to[i] = int8_t(int32_t((value + MAGIC) - MAGIC));
  }
}

void run(const Arguments& in, int64_t token) {
  alignas(64) float x[LARGEST_HEAD], row[LARGEST_HEAD];
  int64_t half = in.rotary / 2, slot = in.slots[token], dim = in.k.size;
  if (in.rotary) read(in.cos_sin, (in.positions ? in.positions[token] : token) * in.cos_sin_stride, in.rotary, in.cos_sin_dtype, row);
  auto turn = [&](const float* norm) {
    if (norm) normalise(x, dim, norm, float(in.eps));
    if (in.rotary) rotate(x, row, row + half, half, in.interleaved);
  };
  if (in.q)
    for (int64_t head = 0; head < in.heads; ++head) {
      int64_t at = token * in.q_stride + head * dim, to = (token * in.heads + head) * dim;
      if (straight(in, in.q_norm, in.dtype)) {
        through(in, in.q, at, in.q_out, to, row, dim);
        continue;
      }
      read(in.q, at, dim, in.dtype, x);
      turn(in.q_norm);
      write(in.q_out, to, dim, in.dtype, x);
    }
  if (slot < 0) return;
  int64_t block = slot / in.block_size, offset = slot % in.block_size;
  for (int64_t head = 0; head < in.kv_heads; ++head) {
    int64_t k_at = token * in.k_stride + head * dim, v_at = token * in.v_stride + head * in.v.size;
    if (straight(in, in.k_norm, in.cache_dtype)) {
      through(in, in.k_from, k_at, in.k.cache, place(in.k, block, offset, head), row, dim);
    } else {
      read(in.k_from, k_at, dim, in.dtype, x);
      turn(in.k_norm);
      keep(in.k, in.cache_dtype, block, offset, head, x);
    }
    if (in.cache_dtype == in.dtype) {
      int64_t size = in.dtype == F32 ? 4 : 2;
      char* to = static_cast<char*>(in.v.cache) + place(in.v, block, offset, head) * size;
      std::memcpy(to, static_cast<const char*>(in.v_from) + v_at * size, in.v.size * size);
      continue;
    }
    read(in.v_from, v_at, in.v.size, in.dtype, x);
    keep(in.v, in.cache_dtype, block, offset, head, x);
  }
}

}  // namespace

// 0, or 1 if a slot or a position is out of range; nothing is written then.
extern "C" int32_t gcu_rope_and_cache(const Arguments* arguments) {
  const Arguments& in = *arguments;
  for (int64_t t = 0; t < in.tokens; ++t) {
    if (in.slots[t] < -1 || in.slots[t] >= in.slot_count) return 1;
    if (in.positions && (in.positions[t] < 0 || in.positions[t] >= in.rows)) return 1;
  }
  bool parallel = in.threads > 1 && in.tokens > 1 && in.tokens * (in.heads + in.kv_heads) > WAKE;
#pragma omp parallel for num_threads(in.threads) if (parallel) schedule(static)
  for (int64_t t = 0; t < in.tokens; ++t) run(in, t);
  return 0;
}
