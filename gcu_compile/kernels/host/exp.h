// exp of vectors of floats, for any vector type V of the compiler and its integers I.
#pragma once

#include <bit>

// exp(x) for x <= 0, relative error below 2e-7; 0 from -87 down. Cody and Waite's reduction, Cephes' polynomial.
template <class V, class I>
inline V exp_negative(V x) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  V shifted = x * 1.44269504f + MAGIC;
  V n = shifted - MAGIC;
  V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  V power = std::bit_cast<V>((std::bit_cast<I>(shifted) + 127) << 23);
  return x <= -87.0f ? V{} : y * power;  // NaN stays NaN
}
