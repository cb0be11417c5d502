// Attention of dense tensors and of a paged KV cache; see attention/dense.py and attention/paged.py for the meaning.
//
//   work item = (sequence, KV head, tile of query rows, part of the keys); a row is one query of one head, so that
//   the heads which share a KV head share its packed keys and values
//   -> for each tile of keys: pack K transposed and V -> S = Q K^T -> softmax, online -> O = alpha O + P V
//   -> O / sum; parts of the keys are merged afterwards
//
// Two arithmetics: F32 (any instruction set, GCC vectors), and BF16 (AVX512-BF16 dot products with float32 sums) for
// bfloat16 queries on a bfloat16 or int8 cache. Integers up to 256 are exact in bfloat16, so int8 caches are read
// exactly, and their scales multiply scores, weights or the result in float32.

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace {

enum Dtype : int32_t { F32T = 0, BF16T = 1, F16T = 2, I8T = 3, BOOLT = 4 };
constexpr float INF = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;  // of one strip: what a micro-kernel holds in registers beside its 6 rows
#elif defined(__AVX2__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif
constexpr int STRIP = LANES * VECTORS;
constexpr int ROWS = 6;        // of a micro-kernel
constexpr int TILE_ROWS = 96;  // query rows of a work item
constexpr int TILE_KEYS = 256, TILE_KEYS_DECODE = 128;  // keys packed at once; few rows: all of it stays in L1
constexpr int64_t WAKE = 200000;    // fewer products take less time than waking other threads
constexpr int64_t PART_KEYS = 512;  // fewest keys that are worth a part of their own

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t Byte __attribute__((vector_size(LANES), aligned(1), may_alias));

}  // namespace

struct Strides {
  int64_t outer, head, token;  // dense: outer is the batch; caches: the block, and token the slot in it
};

// Field order is that of `Arguments` in host/attention.py. Null pointers stand for "not asked for".
struct Arguments {
  const void *q, *k, *v;
  void* out;
  Strides q_at, k_at, v_at, out_at;  // in elements; values of one head are adjacent
  int64_t sequences, heads, kv_heads, head_dim, v_dim, tokens;
  // Paged: tables. Dense: q_len, kv_len, offset, and one "block" per sequence.
  const int32_t *block_table, *query_start_loc, *seq_lens;
  int64_t table_stride, table_blocks, block_size, num_blocks;
  int64_t q_len, kv_len, offset;
  const float *k_scale, *v_scale;  // kind 1: one number, 2: [kv_heads], 3: per token and head, by the strides
  const int32_t *k_zero, *v_zero;
  int64_t k_scale_kind, v_scale_kind;
  Strides k_scale_at, v_scale_at;
  const void* bias;
  int64_t bias_dtype, bias_batch, bias_head, bias_query, bias_key;  // strides
  const float *alibi_slopes, *sinks;  // [heads]
  double scale, soft_cap;
  int64_t window;  // 0: none
  int32_t causal, dtype, cache_dtype, threads;
  int8_t* quantised;      // [tokens, heads, v_dim], or null
  float* quantised_scale; // [tokens]
};

namespace {

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec as_float(Int x) { return std::bit_cast<Vec>(x); }
inline Int as_int(Vec x) { return std::bit_cast<Int>(x); }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline float largest(Vec x) { float m = x[0]; for (int i = 1; i < LANES; ++i) m = std::max(m, x[i]); return m; }
inline float total(Vec x) { float s = 0; for (int i = 0; i < LANES; ++i) s += x[i]; return s; }

inline float to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline uint16_t to_bf16(float x) {  // to nearest, ties to even; NaN stays one
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// exp(x) for x <= 0, relative error below 2e-7; 0 from -87 down.
inline Vec exp_negative(Vec x) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Vec shifted = x * 1.44269504f + MAGIC;
  Vec n = shifted - MAGIC;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  Vec power = as_float((as_int(shifted) + 127) << 23);
  return x <= -87.0f ? Vec{} : y * power;  // NaN stays NaN
}

// tanh by Cephes' polynomial near 0, by the exponential elsewhere.
inline Vec tangent(Vec x) {
  Vec size = x < 0.0f ? -x : x, z = x * x;
  Vec small = ((((z * -5.70498872745e-3f + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z -
               3.33332819422e-1f) * z * x + x;
  Vec e = exp_negative(size * -2.0f), big = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? small : (x < 0.0f ? -big : big);
}

// Lanes of (x, y): x's with bit STEP clear and y's shifted up by it, or x's shifted down and y's with the bit set.
template <int STEP, bool HIGH, int... J>
inline Int exchange(Int x, Int y, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(x, y, (HIGH ? (J & STEP ? LANES + J : J + STEP) : (J & STEP ? LANES + J - STEP : J))...);
}

// LANES x LANES transpose of 32-bit units: one stage for each bit swaps it between row and lane.
template <int STEP = 1>
[[gnu::always_inline]] inline void transpose(Int* r) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    Int x = r[i], y = r[i + STEP];
    r[i] = exchange<STEP, false>(x, y, lanes), r[i + STEP] = exchange<STEP, true>(x, y, lanes);
  }
  if constexpr (2 * STEP < LANES) transpose<2 * STEP>(r);
}

// A row of a cache or tensor: where it is, and the zero point of its integers.
struct Row {
  const char* at;
  int32_t zero;
};

// Rows that will be read next: memory answers while this tile is computed.
struct Ahead {
  const Row* rows;
  int n;
  int64_t bytes;
  void fetch(int from, int to) const {
    for (int i = from; i < std::min(to, n); ++i)
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(rows[i].at + b, 0, 2);
  }
};

// `n` float32 numbers of a row from element `from` on, zeros up to LANES.
inline Vec numbers(const Row& row, int dtype, int64_t from, int64_t n) {
  if (n >= LANES) {
    if (dtype == F32T) return load(reinterpret_cast<const float*>(row.at) + from);
    if (dtype == BF16T) {
      Half bits = *reinterpret_cast<const Half*>(row.at + 2 * from);
      return std::bit_cast<Vec>(__builtin_convertvector(bits, Unsigned) << 16);
    }
    if (dtype == I8T) {
      Byte bytes = *reinterpret_cast<const Byte*>(row.at + from);
      return __builtin_convertvector(__builtin_convertvector(bytes, Int) - row.zero, Vec);
    }
  }
  alignas(64) float values[LANES] = {};
  int64_t count = std::min<int64_t>(n, LANES);
  if (dtype == F32T) std::memcpy(values, reinterpret_cast<const float*>(row.at) + from, count * 4);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row.at) + from;
  if (dtype == BF16T) for (int i = 0; i < count; ++i) values[i] = to_float(halves[i]);
  if (dtype == F16T) for (int i = 0; i < count; ++i) values[i] = float(std::bit_cast<_Float16>(halves[i]));
  if (dtype == I8T) for (int i = 0; i < count; ++i) values[i] = float(int32_t(row.at[from + i]) - row.zero);
  return load(values);
}

// What an arithmetic does: hold rows of Q or P as `A`, pack K and V, multiply. Panels are cut into strips of STRIP
// columns (the last one into whole vectors); a strip is [step][column], a step being one or two products deep.
struct F32 {
  using A = float;
  static constexpr int DEPTH = 1, FEW = 0;

  static void convert(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * 4); }
  static void copy(const Row& row, int dtype, int64_t n, float* to) {
    for (int64_t d = 0; d < n; d += LANES) store(to + d, numbers(row, dtype, d, n - d));
  }

  template <int M, int V>
  static void multiply(const float* a, int64_t lda, const float* b, int64_t steps, float* c, int64_t ldc, const float* alpha) {
    Vec sum[M][V];
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[i][j] = alpha ? load(c + i * ldc + j * LANES) * alpha[i] : Vec{};
    for (int64_t s = 0; s < steps; ++s, b += V * LANES) {
      Vec columns[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) columns[j] = load(b + j * LANES);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) {
        Vec x = splat(a[i * lda + s]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[i][j] += x * columns[j];
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) store(c + i * ldc + j * LANES, sum[i][j]);
  }

  static void pack_k(const Row* keys, int n, int dtype, int64_t dim, float* panel) {
    for (int strip = 0; strip < n; strip += STRIP) {
      int width = std::min(STRIP, (n - strip + LANES - 1) / LANES * LANES);
      for (int lane = 0; lane < width; lane += LANES)
        for (int64_t d = 0; d < dim; d += LANES) {
          Int rows[LANES];
          for (int i = 0; i < LANES; ++i) {
            int key = strip + lane + i;
            rows[i] = key < n ? as_int(numbers(keys[key], dtype, d, dim - d)) : Int{};
          }
          transpose(rows);
          int64_t count = std::min<int64_t>(LANES, dim - d);
          for (int64_t i = 0; i < count; ++i) store(panel + (d + i) * width + lane, as_float(rows[i]));
        }
      panel += width * dim;
    }
  }

  static void pack_v(const Row* keys, int n, int dtype, int64_t dim, float* panel) {
    for (int64_t strip = 0; strip < dim; strip += STRIP) {
      int64_t width = std::min<int64_t>(STRIP, (dim - strip + LANES - 1) / LANES * LANES);
      for (int key = 0; key < n; ++key)
        for (int64_t d = 0; d < width; d += LANES)
          store(panel + key * width + d, numbers(keys[key], dtype, strip + d, dim - strip - d));
      panel += width * n;
    }
  }
};

#ifdef __AVX512F__
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl")
// Word i of a result: the high half of float32 i; words of a and b side by side, first and second 16.
struct Words { alignas(64) uint16_t at[32]; };
constexpr Words words(int kind) {
  Words w{};
  for (int i = 0; i < 32; ++i) w.at[i] = uint16_t(kind == 0 ? 2 * i + 1 : (kind - 1) * 16 + i / 2 + i % 2 * 32);
  return w;
}
constexpr Words WORDS[3] = {words(0), words(1), words(2)};

struct BF16 {
  using A = uint16_t;
  static constexpr int DEPTH = 2, FEW = 8;
  static constexpr const uint16_t *ODD_WORDS = WORDS[0].at, *FIRST_WORDS = WORDS[1].at, *SECOND_WORDS = WORDS[2].at;

  static void convert(const float* from, uint16_t* to, int64_t n) {
    for (int64_t i = 0; i < n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
  }
  static void copy(const Row& row, int, int64_t n, uint16_t* to) { std::memcpy(to, row.at, 2 * n); }

  template <int M, int V>
  static void multiply(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, float* c, int64_t ldc, const float* alpha) {
    __m512 sum[M][V];
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j)
        sum[i][j] = alpha ? _mm512_mul_ps(_mm512_loadu_ps(c + i * ldc + j * 16), _mm512_set1_ps(alpha[i])) : _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s, b += V * 32) {
      __m512bh columns[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) columns[j] = (__m512bh)_mm512_loadu_si512(b + j * 32);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + i * lda + 2 * s, 4);
        __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, columns[j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, sum[i][j]);
  }

  static __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

  // 32 numbers of a row from element `from` on, zeros where `in` is not set. Integers become float32 and lose the low
  // half of it, which is zero.
  template <bool BYTES>
  static __m512i pairs(const Row& row, int64_t from, __mmask32 in) {
    if (!BYTES) return _mm512_maskz_loadu_epi16(in, row.at + 2 * from);
    __m256i bytes = _mm256_maskz_loadu_epi8(in, row.at + from);
    __m512i zero = _mm512_set1_epi32(row.zero);
    __m512i low = _mm512_sub_epi32(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)), zero);
    __m512i high = _mm512_sub_epi32(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)), zero);
    __m512i both = _mm512_permutex2var_epi16((__m512i)_mm512_cvtepi32_ps(low), _mm512_load_si512(ODD_WORDS),
                                             (__m512i)_mm512_cvtepi32_ps(high));
    return in == ~0u ? both : _mm512_maskz_mov_epi16(in, both);
  }

  static void pack_k(const Row* keys, int n, int dtype, int64_t dim, uint16_t* panel) {
    dtype == I8T ? pack_k<true>(keys, n, dim, panel) : pack_k<false>(keys, n, dim, panel);
  }
  static void pack_v(const Row* values, int n, int dtype, int64_t dim, uint16_t* panel) {
    dtype == I8T ? pack_v<true>(values, n, dim, panel) : pack_v<false>(values, n, dim, panel);
  }

  template <bool BYTES>
  static void pack_k(const Row* keys, int n, int64_t dim, uint16_t* panel) {
    int64_t steps = (dim + 1) / 2;
    for (int strip = 0; strip < n; strip += STRIP) {
      int width = std::min(STRIP, (n - strip + LANES - 1) / LANES * LANES);
      for (int lane = 0; lane < width; lane += LANES)
        for (int64_t s = 0; s < steps; s += LANES) {
          Int rows[LANES];
          __mmask32 in = first(dim - 2 * s);
          for (int i = 0; i < LANES; ++i) {
            int key = strip + lane + i;
            rows[i] = key < n ? std::bit_cast<Int>(pairs<BYTES>(keys[key], 2 * s, in)) : Int{};
          }
          transpose(rows);
          int64_t count = std::min<int64_t>(LANES, steps - s);
          for (int64_t i = 0; i < count; ++i)
            _mm512_storeu_si512(panel + 2 * ((s + i) * width + lane), std::bit_cast<__m512i>(rows[i]));
        }
      panel += 2 * width * steps;
    }
  }

  // Keys 2s and 2s + 1 side by side.
  template <bool BYTES>
  static void pack_v(const Row* values, int n, int64_t dim, uint16_t* panel) {
    int steps = (n + 1) / 2;
    for (int64_t strip = 0; strip < dim; strip += STRIP) {
      int64_t width = std::min<int64_t>(STRIP, (dim - strip + LANES - 1) / LANES * LANES);
      for (int64_t d = 0; d < width; d += 32) {
        __mmask32 in = first(dim - strip - d);
        for (int s = 0; s < steps; ++s) {
          __m512i a = pairs<BYTES>(values[2 * s], strip + d, in);
          __m512i b = 2 * s + 1 < n ? pairs<BYTES>(values[2 * s + 1], strip + d, in) : _mm512_setzero_si512();
          uint16_t* to = panel + 2 * (s * width + d);
          _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, _mm512_load_si512(FIRST_WORDS), b));
          if (d + 16 < width) _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, _mm512_load_si512(SECOND_WORDS), b));
        }
      }
      panel += 2 * width * steps;
    }
  }

  // Few rows (decode): K and V are used as they lie, since packing would cost more than the products. A batch of 16
  // scores, R rows of 16 / R keys, is summed over the lanes as a transpose would do it.
  static void scores(const uint16_t* q, int64_t ldq, int rows, const Row* keys, int n, int dtype, int64_t dim, float* s, Ahead ahead) {
    auto run = [&]<bool BYTES>() {
      rows == 1 ? scores<1, BYTES>(q, ldq, rows, keys, n, dim, s, ahead) : rows == 2 ? scores<2, BYTES>(q, ldq, rows, keys, n, dim, s, ahead)
      : rows <= 4 ? scores<4, BYTES>(q, ldq, rows, keys, n, dim, s, ahead) : scores<8, BYTES>(q, ldq, rows, keys, n, dim, s, ahead);
    };
    dtype == I8T ? run.template operator()<true>() : run.template operator()<false>();
  }
  static void weigh(const uint16_t* p, int rows, const Row* values, int n, int dtype, int64_t dim, float* o, int64_t ldo, const float* alpha, Ahead ahead) {
    auto run = [&]<bool BYTES>() {
      rows == 1 ? weigh<1, BYTES>(p, rows, values, n, dim, o, ldo, alpha, ahead) : rows == 2 ? weigh<2, BYTES>(p, rows, values, n, dim, o, ldo, alpha, ahead)
      : rows <= 4 ? weigh<4, BYTES>(p, rows, values, n, dim, o, ldo, alpha, ahead) : weigh<8, BYTES>(p, rows, values, n, dim, o, ldo, alpha, ahead);
    };
    dtype == I8T ? run.template operator()<true>() : run.template operator()<false>();
  }

  template <int STEP = 1>
  static void sum_lanes(Vec* x) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2 * STEP) {
      Int a = as_int(x[i]), b = as_int(x[i + STEP]);
      x[i] = as_float(exchange<STEP, false>(a, b, lanes)) + as_float(exchange<STEP, true>(a, b, lanes));
    }
    if constexpr (2 * STEP < LANES) sum_lanes<2 * STEP>(x);
  }

  template <int R, bool BYTES>
  static void scores(const uint16_t* q, int64_t ldq, int rows, const Row* keys, int n, int64_t dim, float* s, Ahead ahead) {
    constexpr int K = 16 / R;
    for (int key = 0; key < n; key += K) {
      ahead.fetch(key, key + K);
      Vec sum[16] = {};
      for (int64_t d = 0; d < dim; d += 32) {
        __mmask32 in = first(dim - d);
        __m512bh row[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) row[r] = (__m512bh)_mm512_loadu_si512(q + r * ldq + d);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
          __m512bh x = (__m512bh)pairs<BYTES>(keys[std::min(key + k, n - 1)], d, in);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r * K + k] = (Vec)_mm512_dpbf16_ps((__m512)sum[r * K + k], row[r], x);
        }
      }
      sum_lanes(sum);
      alignas(64) float values[16];
      store(values, sum[0]);
      for (int r = 0; r < rows; ++r) std::memcpy(s + r * TILE_KEYS + key, values + r * K, 4 * K);
    }
  }

  template <int R, bool BYTES>
  static void weigh(const uint16_t* p, int rows, const Row* values, int n, int64_t dim, float* o, int64_t ldo, const float* alpha, Ahead ahead) {
    constexpr int C = R == 8 ? 1 : 2;  // columns of 32
    for (int64_t d = 0; d < dim; d += 32 * C) {
      __m512 sum[R][2 * C];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; ++c) {
          bool old = alpha && r < rows && d + 16 * c < ldo;
          sum[r][c] = old ? _mm512_mul_ps(_mm512_loadu_ps(o + r * ldo + d + 16 * c), _mm512_set1_ps(alpha[r])) : _mm512_setzero_ps();
        }
      for (int key = 0; key < n; key += 2) {
        if (d == 0) ahead.fetch(key, key + 2);
        __m512bh columns[2 * C];
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
          __mmask32 in = first(dim - d - 32 * c);
          __m512i a = pairs<BYTES>(values[key], d + 32 * c, in);
          __m512i b = pairs<BYTES>(values[std::min(key + 1, n - 1)], d + 32 * c, in);  // its weight is 0 past the end
          columns[2 * c] = (__m512bh)_mm512_permutex2var_epi16(a, _mm512_load_si512(FIRST_WORDS), b);
          columns[2 * c + 1] = (__m512bh)_mm512_permutex2var_epi16(a, _mm512_load_si512(SECOND_WORDS), b);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int32_t pair;
          std::memcpy(&pair, p + r * TILE_KEYS + key, 4);
          __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
          for (int c = 0; c < 2 * C; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], x, columns[c]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; ++c)
          if (r < rows && d + 16 * c < ldo) _mm512_storeu_ps(o + r * ldo + d + 16 * c, sum[r][c]);
    }
  }
};
#pragma GCC pop_options
#endif

// C [m, n] = alpha C + A B, B a panel of `steps` steps. n counts whole vectors.
template <class P>
void matmul(const typename P::A* a, int64_t lda, const typename P::A* b, int64_t steps, float* c, int64_t ldc, int m,
            int64_t n, const float* alpha) {
  using Kernel = void (*)(const typename P::A*, int64_t, const typename P::A*, int64_t, float*, int64_t, const float*);
#define ROW(M) {P::template multiply<M, 1>, P::template multiply<M, 2>, P::template multiply<M, VECTORS - 1>, P::template multiply<M, VECTORS>}
  static constexpr Kernel kernels[ROWS][4] = {ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6)};
#undef ROW
  for (int64_t strip = 0; strip < n; strip += STRIP) {
    int64_t width = std::min<int64_t>(STRIP, n - strip);
    int vectors = int(width / LANES), column = vectors == VECTORS ? 3 : vectors - 1;
    for (int row = 0; row < m; row += ROWS) {
      int rows = std::min(ROWS, m - row);
      kernels[rows - 1][column](a + row * lda, lda, b, steps, c + row * ldc + strip, ldc, alpha ? alpha + row : nullptr);
    }
    b += P::DEPTH * steps * width;
  }
}

int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One work item.
struct Item {
  int64_t sequence, kv_head, first_head, head_count, first_token, token_count;  // tokens within the sequence
  int64_t first_key, last_key;  // half open
  int64_t partial;              // index of its partial result, or -1: writes the output itself
};

// Partial results of an item: float32 sums, and per row the maximum and the sum of weights.
struct Partials {
  std::vector<float> sums, maxima, weights;
};

template <class P>
class Tile {
  using A = typename P::A;

 public:
  Tile(const Arguments& in, Partials& partials) : in_(in), partials_(partials) {
    size_ = in.cache_dtype == F32T ? 4 : in.cache_dtype == I8T ? 1 : 2;
    d_ = rounded(in.head_dim, 2 * LANES), dv_ = rounded(in.v_dim, LANES);
    // One allocation, cut into parts that start on cache lines.
    int64_t sizes[] = {TILE_ROWS * d_ * int64_t(sizeof(A)), TILE_KEYS * d_ * int64_t(sizeof(A)),
                       TILE_KEYS * dv_ * int64_t(sizeof(A)), TILE_ROWS * TILE_KEYS * int64_t(sizeof(A)),
                       TILE_ROWS * TILE_KEYS * 4, TILE_ROWS * dv_ * 4};
    int64_t all = 64;
    for (int64_t size : sizes) all += rounded(size, 64) + 64;
    memory_.reset(new char[all]);
    char* at = reinterpret_cast<char*>(rounded(reinterpret_cast<int64_t>(memory_.get()), 64));
    char** parts[] = {(char**)&q_, (char**)&k_, (char**)&v_, (char**)&p_, (char**)&s_, (char**)&o_};
    for (int i = 0; i < 6; ++i) *parts[i] = at, at += rounded(sizes[i], 64) + 64;
  }

  void run(const Item& item) {
    item_ = item;
    rows_ = int(item.head_count * item.token_count);
    paged_ = in_.block_table != nullptr;
    start_ = paged_ ? in_.query_start_loc[item.sequence] : 0;
    int64_t q_len = paged_ ? in_.query_start_loc[item.sequence + 1] - start_ : in_.q_len;
    offset_ = paged_ ? in_.seq_lens[item.sequence] - q_len : in_.offset;
    load_queries();
    std::fill_n(maximum_, rows_, -INF), std::fill_n(weight_, rows_, 0.0f);
    int step = rows_ <= P::FEW ? TILE_KEYS_DECODE : TILE_KEYS;
    locate(item.first_key, step);
    bool first = true;
    for (int64_t key = item.first_key; key < item.last_key; key += step, first = false) {
      std::swap(now_, next_);
      locate(key + step, step);
      const Keys& at = *now_;
      const float* alpha = first ? nullptr : alpha_;
      if (rows_ <= P::FEW) {
        if constexpr (P::FEW) {
          P::scores(q_, d_, rows_, at.k, at.n, in_.cache_dtype, in_.head_dim, s_, {at.v, at.n, in_.v_dim * size_});
          for (int row = 0; row < rows_; ++row) soften(row, key);
          Ahead ahead{next_->k, next_->n, in_.head_dim * size_};
          P::weigh(p_, rows_, at.v, at.n, in_.cache_dtype, in_.v_dim, o_, dv_, alpha, ahead);
        }
        continue;
      }
      int64_t depth = P::DEPTH;
      P::pack_k(at.k, at.n, in_.cache_dtype, in_.head_dim, k_);
      matmul<P>(q_, d_, k_, (in_.head_dim + depth - 1) / depth, s_, TILE_KEYS, rows_, rounded(at.n, LANES), nullptr);
      for (int row = 0; row < rows_; ++row) soften(row, key);
      P::pack_v(at.v, at.n, in_.cache_dtype, in_.v_dim, v_);
      matmul<P>(p_, TILE_KEYS, v_, (at.n + depth - 1) / depth, o_, dv_, rows_, dv_, alpha);
    }
    if (first) std::fill_n(o_, rows_ * dv_, 0.0f);
    if (item.partial >= 0) keep();
    else finish_all();
  }

  // Output row of `in` from sums, maximum and sum of weights.
  static void finish(const Arguments& in, const Item& item, int row, const float* sums, float maximum, float weight) {
    int64_t head = item.first_head + row % item.head_count, token = item.first_token + row / item.head_count;
    float factor = 1.0f;
    if (in.sinks) {
      float sink = in.sinks[head], both = std::max(maximum, sink);
      if (both > -INF) {
        factor = std::exp(maximum - both);
        weight = weight * factor + std::exp(sink - both);
      }
    }
    factor = weight > 0 ? factor / weight : 0.0f;
    if (in.v_scale_kind == 1) factor *= in.v_scale[0];
    if (in.v_scale_kind == 2) factor *= in.v_scale[item.kv_head];
    int64_t outer = in.block_table ? in.query_start_loc[item.sequence] * in.out_at.token : item.sequence * in.out_at.outer;
    int64_t at = outer + token * in.out_at.token + head * in.out_at.head;
    if (in.dtype == F32T) {
      float* to = static_cast<float*>(in.out) + at;
      for (int64_t d = 0; d < in.v_dim; ++d) to[d] = sums[d] * factor;
    } else if (in.dtype == BF16T) {
      uint16_t* to = static_cast<uint16_t*>(in.out) + at;
      for (int64_t d = 0; d < in.v_dim; ++d) to[d] = to_bf16(sums[d] * factor);
    } else {
      _Float16* to = static_cast<_Float16*>(in.out) + at;
      for (int64_t d = 0; d < in.v_dim; ++d) to[d] = _Float16(sums[d] * factor);
    }
  }

 private:
  void load_queries() {
    int64_t size = in_.dtype == F32T ? 4 : 2;
    std::memset(q_, 0, std::max(rows_, P::FEW) * d_ * sizeof(A));
    for (int row = 0; row < rows_; ++row) {
      int64_t head = item_.first_head + row % item_.head_count, token = item_.first_token + row / item_.head_count;
      int64_t at = (paged_ ? start_ * in_.q_at.token : item_.sequence * in_.q_at.outer) + token * in_.q_at.token + head * in_.q_at.head;
      P::copy({static_cast<const char*>(in_.q) + at * size, 0}, in_.dtype, in_.head_dim, q_ + row * d_);
    }
  }

  // A tile of keys: where they and their values lie, and the scales of their own.
  struct Keys {
    int n;
    Row k[TILE_KEYS], v[TILE_KEYS];
    alignas(64) float k_factor[TILE_KEYS], v_factor[TILE_KEYS];
  };

  // next_ = up to `step` keys of the item from `key` on, block by block.
  void locate(int64_t key, int step) {
    Keys& to = *next_;
    to.n = int(std::clamp<int64_t>(item_.last_key - key, 0, step));
    int64_t head = item_.kv_head, block_size = paged_ ? in_.block_size : in_.kv_len;
    const char *k = static_cast<const char*>(in_.k) + head * in_.k_at.head * size_;
    const char *v = static_cast<const char*>(in_.v) + head * in_.v_at.head * size_;
    for (int i = 0; i < to.n;) {
      int64_t j = key + i, slot = j % block_size, block = item_.sequence;
      if (paged_) block = in_.block_table[item_.sequence * in_.table_stride + j / block_size];
      const char *k_block = k + block * in_.k_at.outer * size_, *v_block = v + block * in_.v_at.outer * size_;
      auto at = [&](const Strides& s) { return block * s.outer + head * s.head + slot * s.token; };
      auto zero = [&](const int32_t* z, int64_t kind, const Strides& s) {
        return !z ? 0 : kind == 1 ? z[0] : kind == 2 ? z[head] : z[at(s)];
      };
      for (int stop = int(std::min<int64_t>(to.n, i + block_size - slot)); i < stop; ++i, ++slot) {
        to.k[i] = {k_block + slot * in_.k_at.token * size_, zero(in_.k_zero, in_.k_scale_kind, in_.k_scale_at)};
        to.v[i] = {v_block + slot * in_.v_at.token * size_, zero(in_.v_zero, in_.v_scale_kind, in_.v_scale_at)};
        if (in_.k_scale_kind == 3) to.k_factor[i] = in_.k_scale[at(in_.k_scale_at)];
        if (in_.v_scale_kind == 3) to.v_factor[i] = in_.v_scale[at(in_.v_scale_at)];
      }
    }
    for (int i = to.n; i < int(rounded(to.n, LANES)); ++i) to.k_factor[i] = to.v_factor[i] = 0;
  }

  // Scores of a row -> weights in p_, and what the sums so far must be multiplied by.
  void soften(int row, int64_t key) {
    int n = now_->n;
    float* s = s_ + row * TILE_KEYS;
    int64_t head = item_.first_head + row % item_.head_count;
    int64_t query = item_.first_token + row / item_.head_count, position = query + offset_;
    int64_t end = in_.causal ? std::clamp<int64_t>(position + 1 - key, 0, n) : n;
    int64_t begin = in_.window ? std::clamp<int64_t>(position - in_.window + 1 - key, 0, n) : 0;
    int width = int(rounded(n, LANES));
    float scale = float(in_.scale);
    if (in_.k_scale_kind == 1) scale *= in_.k_scale[0];
    if (in_.k_scale_kind == 2) scale *= in_.k_scale[item_.kv_head];
    bool cap = in_.soft_cap > 0;
    float slope = in_.alibi_slopes ? in_.alibi_slopes[head] : 0.0f, inverse = cap ? float(1 / in_.soft_cap) : 0.0f;
    Vec lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = float(i);
    for (int i = 0; i < width; i += LANES) {
      Vec x = load(s + i) * scale;
      if (in_.k_scale_kind == 3) x *= load(now_->k_factor + i);
      if (cap) x = tangent(x * inverse) * float(in_.soft_cap);
      if (slope != 0) x += (lanes + float(key + i - position)) * slope;
      store(s + i, x);
    }
    if (in_.bias) add_bias(s, head, query, key, n);
    for (int64_t i = 0; i < std::min<int64_t>(begin, width); ++i) s[i] = -INF;
    for (int64_t i = std::max(end, int64_t(0)); i < width; ++i) s[i] = -INF;
    Vec top = splat(-INF);
    for (int i = 0; i < width; i += LANES) top = maximum(top, load(s + i));
    float before = maximum_[row], now = std::max(before, largest(top)), base = now == -INF ? 0.0f : now;
    Vec sum = {};
    for (int i = 0; i < width; i += LANES) {
      Vec p = exp_negative(load(s + i) - base);
      sum += p;
      if (in_.v_scale_kind == 3) p *= load(now_->v_factor + i);
      store(s + i, p);
    }
    P::convert(s, p_ + row * TILE_KEYS, width);
    alpha_[row] = before == -INF ? 0.0f : std::exp(before - base);
    weight_[row] = weight_[row] * alpha_[row] + total(sum);
    maximum_[row] = now;
  }

  void add_bias(float* s, int64_t head, int64_t query, int64_t key, int n) const {
    int64_t at = item_.sequence * in_.bias_batch + head * in_.bias_head + query * in_.bias_query + key * in_.bias_key;
    int64_t step = in_.bias_key;
    if (in_.bias_dtype == BOOLT) {
      const uint8_t* bias = static_cast<const uint8_t*>(in_.bias) + at;
      for (int i = 0; i < n; ++i) s[i] = bias[i * step] ? s[i] : -INF;
    } else if (in_.bias_dtype == F32T) {
      const float* bias = static_cast<const float*>(in_.bias) + at;
      for (int i = 0; i < n; ++i) s[i] += bias[i * step];
    } else if (in_.bias_dtype == BF16T) {
      const uint16_t* bias = static_cast<const uint16_t*>(in_.bias) + at;
      for (int i = 0; i < n; ++i) s[i] += to_float(bias[i * step]);
    } else {
      const _Float16* bias = static_cast<const _Float16*>(in_.bias) + at;
      for (int i = 0; i < n; ++i) s[i] += float(bias[i * step]);
    }
  }

  void finish_all() {
    for (int row = 0; row < rows_; ++row) finish(in_, item_, row, o_ + row * dv_, maximum_[row], weight_[row]);
  }

  void keep() {
    for (int row = 0; row < rows_; ++row) {
      int64_t at = item_.partial + row;
      std::memcpy(&partials_.sums[at * dv_], o_ + row * dv_, dv_ * 4);
      partials_.maxima[at] = maximum_[row], partials_.weights[at] = weight_[row];
    }
  }

  const Arguments& in_;
  Partials& partials_;
  Item item_;
  int64_t d_, dv_, start_, offset_, size_;  // size_: bytes of one number of the cache
  int rows_;
  bool paged_;
  std::unique_ptr<char[]> memory_;
  A *q_, *k_, *v_, *p_;
  float *s_, *o_;
  Keys keys_[2], *now_ = &keys_[0], *next_ = &keys_[1];
  float maximum_[TILE_ROWS], weight_[TILE_ROWS], alpha_[TILE_ROWS];
};

// Whether lengths and the table entries that will be read are in range; attention/checks.py names what is not.
bool valid(const Arguments& in) {
  if (!in.block_table) return true;
  if (in.query_start_loc[0] < 0) return false;
  for (int64_t s = 0; s < in.sequences; ++s) {
    int64_t begin = in.query_start_loc[s], end = in.query_start_loc[s + 1], length = in.seq_lens[s];
    if (end < begin || end > in.tokens) return false;
    if (length < 0 || (in.causal && end > begin && length < end - begin)) return false;
    if (length > in.table_blocks * in.block_size) return false;
    if (end == begin) continue;
    int64_t first = in.window ? std::max<int64_t>(0, length - (end - begin) - in.window + 1) : 0;
    for (int64_t j = first / in.block_size; j * in.block_size < length; ++j) {
      int64_t block = in.block_table[s * in.table_stride + j];
      if (block < 0 || block >= in.num_blocks) return false;
    }
  }
  return true;
}

// Items in the order of the work: the longest first. `heads`: of items that are parts, where the row's parts begin.
std::vector<Item> plan(const Arguments& in, std::vector<std::vector<Item>>& split, int64_t& partial_rows) {
  int64_t group = in.heads / in.kv_heads, head_count = std::min<int64_t>(group, TILE_ROWS);
  int64_t token_count = TILE_ROWS / head_count;
  std::vector<Item> items;
  for (int64_t s = 0; s < in.sequences; ++s) {
    int64_t q_len = in.block_table ? in.query_start_loc[s + 1] - in.query_start_loc[s] : in.q_len;
    int64_t kv_len = in.block_table ? in.seq_lens[s] : in.kv_len;
    int64_t offset = in.block_table ? kv_len - q_len : in.offset;
    for (int64_t h = 0; h < in.kv_heads; ++h)
      for (int64_t g = 0; g < group; g += head_count)
        for (int64_t t = 0; t < q_len; t += token_count) {
          int64_t tokens = std::min(token_count, q_len - t);
          int64_t last = in.causal ? std::clamp<int64_t>(t + tokens + offset, 0, kv_len) : kv_len;
          int64_t first = in.window ? std::clamp<int64_t>(t + offset - in.window + 1, 0, last) : 0;
          items.push_back({s, h, h * group + g, std::min(head_count, group - g), t, tokens, first, last, -1});
        }
  }
  auto work = [](const Item& i) { return (i.last_key - i.first_key) * (i.head_count * i.token_count + 16); };
  int64_t sum = 0;
  for (const Item& item : items) sum += work(item);
  // An item that would keep one thread busy for longer than a quarter of its share is cut.
  std::vector<Item> result;
  for (const Item& item : items) {
    int64_t keys = item.last_key - item.first_key;
    int64_t parts = in.threads > 1 ? std::min(keys / PART_KEYS, 4 * in.threads * work(item) / std::max<int64_t>(sum, 1)) : 1;
    if (parts < 2) { result.push_back(item); continue; }
    split.emplace_back();
    int64_t size = rounded((keys + parts - 1) / parts, TILE_KEYS_DECODE);
    for (int64_t key = item.first_key; key < item.last_key; key += size) {
      Item part = item;
      part.first_key = key, part.last_key = std::min(item.last_key, key + size), part.partial = partial_rows;
      partial_rows += item.head_count * item.token_count;
      split.back().push_back(part), result.push_back(part);
    }
  }
  std::stable_sort(result.begin(), result.end(), [&](const Item& a, const Item& b) { return work(a) > work(b); });
  return result;
}

// Merges the parts of an item: each sum is brought to the common maximum.
template <class P>
void merge(const Arguments& in, const std::vector<Item>& parts, const Partials& partials, int64_t dv) {
  std::vector<float> sums(dv);
  for (int row = 0; row < parts[0].head_count * parts[0].token_count; ++row) {
    float maximum = -INF, weight = 0;
    for (const Item& part : parts) maximum = std::max(maximum, partials.maxima[part.partial + row]);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (const Item& part : parts) {
      int64_t at = part.partial + row;
      if (partials.maxima[at] == -INF) continue;
      float factor = std::exp(partials.maxima[at] - maximum);
      weight += partials.weights[at] * factor;
      for (int64_t d = 0; d < dv; ++d) sums[d] += partials.sums[at * dv + d] * factor;
    }
    Tile<P>::finish(in, parts[0], row, sums.data(), maximum, weight);
  }
}

// int8 of every token of `out`, one scale each.
void quantise(const Arguments& in) {
  int64_t n = in.heads * in.v_dim;
#pragma omp parallel for num_threads(in.threads)
  for (int64_t token = 0; token < in.tokens; ++token) {
    const char* at = static_cast<const char*>(in.out) + token * n * (in.dtype == F32T ? 4 : 2);
    auto value = [&](int64_t i) {
      if (in.dtype == F32T) return reinterpret_cast<const float*>(at)[i];
      if (in.dtype == BF16T) return to_float(reinterpret_cast<const uint16_t*>(at)[i]);
      return float(reinterpret_cast<const _Float16*>(at)[i]);
    };
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(value(i)));
    float scale = largest == 0 ? 1.0f : largest / 127;
    for (int64_t i = 0; i < n; ++i)
      in.quantised[token * n + i] = int8_t(std::clamp(std::nearbyint(value(i) / scale), -128.0f, 127.0f));
    in.quantised_scale[token] = scale;
  }
}

template <class P>
void attend(const Arguments& in) {
  std::vector<std::vector<Item>> split;
  int64_t partial_rows = 0, dv = rounded(in.v_dim, LANES);
  std::vector<Item> items = plan(in, split, partial_rows);
  int64_t products = 0;
  for (const Item& i : items)
    products += (i.last_key - i.first_key) * i.head_count * i.token_count * (in.head_dim + in.v_dim);
  bool parallel = in.threads > 1 && items.size() > 1 && products > WAKE;
  Partials partials;
  partials.sums.resize(partial_rows * dv), partials.maxima.resize(partial_rows), partials.weights.resize(partial_rows);
#pragma omp parallel num_threads(in.threads) if (parallel)
  {
    auto tile = std::make_unique<Tile<P>>(in, partials);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); ++i) tile->run(items[i]);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < split.size(); ++i) merge<P>(in, split[i], partials, dv);
  }
}

}  // namespace

// 0, or 1 if lengths or table entries are out of range; nothing is computed then.
extern "C" int32_t gcu_attention(const Arguments* arguments) {
  const Arguments& in = *arguments;
  if (!valid(in)) return 1;
  if (in.block_table) {  // tokens of no sequence are padding
    int64_t token = in.heads * in.v_dim * (in.dtype == F32T ? 4 : 2), end = in.query_start_loc[in.sequences];
    std::memset(in.out, 0, in.query_start_loc[0] * token);
    std::memset(static_cast<char*>(in.out) + end * token, 0, (in.tokens - end) * token);
  }
#ifdef __AVX512F__
  bool exact = in.dtype == BF16T && (in.cache_dtype == BF16T || in.cache_dtype == I8T);
  if (exact && __builtin_cpu_supports("avx512bf16")) attend<BF16>(in);
  else attend<F32>(in);
#else
  attend<F32>(in);
#endif
  if (in.quantised) quantise(in);
  return 0;
}
