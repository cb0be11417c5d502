// AMX's instructions one by one, for the test of their emulation.
#include "../../../gcu_compile/kernels/host/amx.h"

#include <thread>

namespace {

void multiply(int type) {  // emulated::Type; the instructions are statements, not expressions
  if (type == 0) _tile_dpbf16ps(0, 1, 2);
  if (type == 1) _tile_dpbssd(0, 1, 2);
  if (type == 2) _tile_dpbsud(0, 1, 2);
  if (type == 3) _tile_dpbusd(0, 1, 2);
  if (type == 4) _tile_dpbuud(0, 1, 2);
}

}  // namespace

// tmm0 (of c) += tmm1 (of a) tmm2 (of b); the configuration that a thread has then goes to `kept`.
extern "C" void product(const amx::Config* config, int type, const void* a, int64_t a_stride, const void* b,
                        int64_t b_stride, void* c, int64_t c_stride, amx::Config* kept) {
  amx::load(*config);
  amx::fence();
  _tile_loadd(0, c, c_stride);
  _tile_stream_loadd(1, a, a_stride);
  _tile_loadd(2, b, b_stride);
  multiply(type);
  _tile_stored(0, c, c_stride);
  asm volatile("sttilecfg %0" : "=m"(*kept));
  amx::release();
}

// Loads tmm3 and stores it.
extern "C" void copy(const amx::Config* config, const void* from, int64_t stride, void* to) {
  amx::load(*config);
  amx::fence();
  _tile_loadd(3, from, stride);
  _tile_stored(3, to, stride);
  amx::release();
}

// Addresses in each of their forms: `by` rows of 64 bytes in, at displacements of 0, 8 and 32 bits, from every register
// that the compiler has to spare.
extern "C" void addresses(const amx::Config* config, const char* from, char* to) {
  amx::load(*config);
  amx::fence();
  int64_t stride = 64, half = 32;
  asm volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(from), "r"(stride));
  asm volatile("tileloadd 64(%0,%1,2), %%tmm1" : : "r"(from), "r"(half));
  asm volatile("tileloadd 1024(%0,%1,1), %%tmm2" : : "r"(from), "r"(stride));
  asm volatile("mov %0, %%r12; mov %1, %%r13; tileloadd -64(%%r12,%%r13,1), %%tmm3" : : "r"(from + 192), "r"(stride)
               : "r12", "r13");
  asm volatile("mov %0, %%r13; tileloadd 256(%%r13), %%tmm4" : : "r"(from) : "r13");  // no index: the same row
  asm volatile("mov %%rbp, %%r12; mov %0, %%rbp; tileloadd (%%rbp,%1,1), %%tmm5; mov %%r12, %%rbp"
               : : "a"(from + 320), "c"(stride) : "r12");
  _tile_stored(0, to, 64);
  _tile_stored(1, to + 1024, 64);
  _tile_stored(2, to + 2048, 64);
  _tile_stored(3, to + 3072, 64);
  _tile_stored(4, to + 4096, 64);
  _tile_stored(5, to + 5120, 64);
  amx::release();
}

// A number that a register holds across instructions of tiles; 0 if it came back.
extern "C" int registers(const amx::Config* config) {
  amx::load(*config);
  const __m512i mine = _mm512_set1_epi32(0x1234567);
  __m512i vector, upper;
  int mask;
  asm volatile(
      "vmovdqa64 %3, %%zmm1; vmovdqa64 %3, %%zmm20; mov $0x5a5a, %%eax; kmovw %%eax, %%k1; tilezero %%tmm0; "
      "vmovdqa64 %%zmm1, %0; vmovdqa64 %%zmm20, %1; kmovw %%k1, %2"
      : "=m"(vector), "=m"(upper), "=r"(mask)
      : "v"(mine)
      : "xmm1", "xmm20", "rax", "k1");
  amx::release();
  return mask != 0x5a5a || _mm512_cmpneq_epi32_mask(vector, mine) || _mm512_cmpneq_epi32_mask(upper, mine);
}

// Each thread has tiles of its own, whatever another does between.
extern "C" void two_threads(const amx::Config* config, const void* from, void* to) {
  amx::load(*config);
  amx::fence();
  _tile_loadd(0, from, 64);
  std::thread([&] {
    amx::load(*config);
    _tile_zero(0);
    amx::release();
  }).join();
  _tile_stored(0, to, 64);
  amx::release();
}

// What a CPU refuses to do.
extern "C" void fault(const amx::Config* config, int which) {
  char line[64] = {};
  if (which == 0) _tile_zero(3);  // no configuration
  amx::load(*config);
  if (which == 1) _tile_zero(7);  // one that does not have the tile
  if (which == 2) _tile_dpbssd(0, 1, 2);
  if (which == 3) asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");  // tdpbf16ps of tmm0, tmm1, tmm1: not assembled
  if (which == 4) _tile_loadd(6, line, 0);
  if (which == 5) _tile_stored(5, line, 0);
  amx::release();
  if (which == 6) _tile_stored(0, line, 0);
}
