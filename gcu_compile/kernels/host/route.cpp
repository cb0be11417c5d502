// Sorts the rows of a mixture by expert: token t goes to its top_k experts, and each expert gets its rows together, in
// the order of the tokens.
#include <cstdint>
#include <cstring>
#include <vector>

// Field order is that of `FIELDS` in host/experts.py.
struct Arguments {
  const void* ids;          // [tokens, top_k], int32 or int64
  const char* x;            // [tokens], rows of `row_bytes` bytes, `x_stride` bytes apart
  const float* scales;      // [tokens], or null
  const int32_t* zeros;     // [tokens], or null
  int64_t* place;           // [tokens * top_k]: where the row of a token's i-th expert is
  int64_t* offsets;         // [experts + 1]: expert e has the rows [offsets[e], offsets[e + 1])
  char* rows;               // [tokens * top_k], `row_bytes` each
  float* row_scales;        // [tokens * top_k], or null
  int32_t* row_zeros;       // [tokens * top_k], or null
  int64_t tokens, top_k, experts, row_bytes, x_stride;
  int32_t wide, threads;    // wide: ids are int64
};

namespace {

constexpr int64_t WAKE = 1 << 18;  // fewer bytes are copied before other threads are awake

int64_t id_of(const Arguments& in, int64_t i) {
  return in.wide ? static_cast<const int64_t*>(in.ids)[i] : static_cast<const int32_t*>(in.ids)[i];
}

}  // namespace

// 1: an id is none of an expert here, and nothing was written but offsets and places.
extern "C" int32_t gcu_route(const Arguments* arguments) {
  const Arguments& in = *arguments;
  const int64_t count = in.tokens * in.top_k;
  std::memset(in.offsets, 0, (in.experts + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) {
    int64_t id = id_of(in, i);
    if (id < 0 || id >= in.experts) return 1;
    ++in.offsets[id + 1];
  }
  for (int64_t e = 0; e < in.experts; ++e) in.offsets[e + 1] += in.offsets[e];
  std::vector<int64_t> next(in.offsets, in.offsets + in.experts);
  for (int64_t i = 0; i < count; ++i) in.place[i] = next[id_of(in, i)]++;
#pragma omp parallel for schedule(static) num_threads(count * in.row_bytes < WAKE ? 1 : in.threads)
  for (int64_t i = 0; i < count; ++i) {
    int64_t token = i / in.top_k, row = in.place[i];
    std::memcpy(in.rows + row * in.row_bytes, in.x + token * in.x_stride, in.row_bytes);
    if (in.scales) in.row_scales[row] = in.scales[token];
    if (in.zeros) in.row_zeros[row] = in.zeros[token];
  }
  return 0;
}
