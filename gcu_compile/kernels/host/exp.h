// exp of vectors of floats.
#pragma once

#include "simd.h"

// exp(x) for x <= 0, relative error below 2e-7; 0 from -87 down. Cody and Waite's reduction, Cephes' polynomial.
inline vf exp_negative(vf x) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  vf shifted = fma(x, splat(1.44269504f), splat(MAGIC));
  vf n = shifted - MAGIC;
  vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  // In pairs, for a chain of fused products would take longer than the rest of a row's work.
  vf square = r * r;
  vf high = fma(fma(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f)), square,
                fma(r, splat(8.3334519073e-3f), splat(4.1665795894e-2f)));
  vf low = fma(r, splat(1.6666665459e-1f), splat(5.0000001201e-1f));
  vf y = fma(fma(high, square, low), square, r) + 1.0f;
  vf power = std::bit_cast<vf>((std::bit_cast<vi>(shifted) + 127) << 23);
  return x <= -87.0f ? vf{} : y * power;  // NaN stays NaN
}
