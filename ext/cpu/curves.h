// Vector exponential and error function. Errors measured against float64: exp 1.2e-7 relative over
// its whole range (0 below -87.3), erfc 1.5e-6 relative down to erfc(5), erf and tanh 1.2e-7.
#pragma once
#include "vec.h"

namespace blockllm {

// Reduction by a two-part ln 2 (Cody and Waite), then the Taylor series to degree 7 on |r| < ln2
// / 2.
inline Vec exp(Vec x) {
  const Vec floor = fill(-87.3f);
  const Vec y = min(max(x, floor), fill(88.3f));
  const Vec n = round(mul(y, fill(1.44269504089f)));
  Vec r = fma(n, fill(-0.693359375f), y);
  r = fma(n, fill(2.12194440e-4f), r);
  Vec p = fill(1.0f / 5040);
  p = fma(p, r, fill(1.0f / 720));
  p = fma(p, r, fill(1.0f / 120));
  p = fma(p, r, fill(1.0f / 24));
  p = fma(p, r, fill(1.0f / 6));
  p = fma(p, r, fill(0.5f));
  p = fma(p, r, fill(1.0f));
  p = fma(p, r, fill(1.0f));
  return select_less(x, floor, zero(), scale_pow2(p, n));
}

// exp(x) for x <= 0 alone, to 2e-7 of 1: cheaper, and as good as weights of a sum need. Zero below
// -87.3.
inline Vec exp_below(Vec x) {
#if defined(__AVX512F__)
  const Vec y = mul(x, fill(1.44269504089f));
  const Vec r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = fma(fill(0.00186713f), r, fill(0.00901703f));
  p = fma(p, r, fill(0.05579991f));
  p = fma(p, r, fill(0.24016445f));
  p = fma(p, r, fill(0.69315131f));
  p = fma(p, r, fill(1.0f));
  const __mmask16 normal = _mm512_cmp_ps_mask(y, fill(-126.0f), _CMP_GE_OQ);
  return _mm512_maskz_scalef_ps(normal, p, y);
#else
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: in a sum with it whole numbers remain
  const Vec y = mul(x, fill(1.44269504089f));
  const Vec shifted = add(y, fill(kWhole));
  const Vec r = sub(y, sub(shifted, fill(kWhole)));
  Vec p = fma(fill(0.00132647273f), r, fill(0.00967151299f));
  p = fma(p, r, fill(0.0555073358f));
  p = fma(p, r, fill(0.240222424f));
  p = fma(p, r, fill(0.693147004f));
  p = fma(p, r, fill(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  const Vec power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  return _mm256_and_ps(power, _mm256_cmp_ps(y, fill(-126.0f), _CMP_GE_OQ));
#endif
}

// Zero below -88, where exp(-x) nears the end of float32: times a huge negative x it must stay
// small.
inline Vec sigmoid(Vec x) {
  const Vec y = reciprocal(add(fill(1.0f), exp(sub(zero(), x))));
  return select_less(x, fill(-88.0f), zero(), y);
}

// Cephes' polynomial near zero, where 1 - 2 / (exp(2 |x|) + 1) would lose what matters.
inline Vec tanh(Vec x) {
  const Vec z = abs(x), z2 = mul(x, x);
  Vec p = fill(-5.70498872745e-3f);
  p = fma(p, z2, fill(2.06390887954e-2f));
  p = fma(p, z2, fill(-5.37397155531e-2f));
  p = fma(p, z2, fill(1.33314422036e-1f));
  p = fma(p, z2, fill(-3.33332819422e-1f));
  const Vec near = fma(mul(p, z2), x, x);
  const Vec far = sub(fill(1.0f), div(fill(2.0f), add(exp(add(z, z)), fill(1.0f))));
  const Vec signed_far = select_less(x, zero(), sub(zero(), far), far);
  return select_less(z, fill(0.625f), near, signed_far);
}

// erf(z) / z for |z| < 1, a polynomial in z^2 fitted at Chebyshev nodes.
inline Vec erf_over_z(Vec z2) {
  Vec p = fill(7.847259257687256e-05f);
  p = fma(p, z2, fill(-0.0008008189033716917f));
  p = fma(p, z2, fill(0.005188099108636379f));
  p = fma(p, z2, fill(-0.026853691786527634f));
  p = fma(p, z2, fill(0.1128358244895935f));
  p = fma(p, z2, fill(-0.3761262595653534f));
  return fma(p, z2, fill(1.1283791065216064f));
}

// erfc(z) for z >= 1: exp(-z^2) t P(t) with t = 1 / (1 + 0.4 z), fitted on [1, 10].
inline Vec erfc_tail(Vec z, Vec z2) {
  const Vec t = div(fill(1.0f), fma(z, fill(0.4f), fill(1.0f)));
  Vec p = fill(-0.11721623688936234f);
  p = fma(p, t, fill(0.24614256620407104f));
  p = fma(p, t, fill(0.0055397553369402885f));
  p = fma(p, t, fill(0.2145596146583557f));
  p = fma(p, t, fill(0.1983274519443512f));
  p = fma(p, t, fill(0.22676323354244232f));
  p = fma(p, t, fill(0.22562260925769806f));
  return mul(mul(exp(sub(zero(), z2)), t), p);
}

// The normal distribution function, (1 + erf(x / sqrt 2)) / 2.
inline Vec normal_cdf(Vec x) {
  const Vec z2 = mul(mul(x, x), fill(0.5f));
  const Vec z = mul(abs(x), fill(0.70710678118f));
  const Vec half = fill(0.5f);
  const Vec near = fma(mul(mul(x, fill(0.70710678118f)), erf_over_z(z2)), half, half);
  const Vec tail = mul(erfc_tail(z, z2), half);
  const Vec far = select_less(x, zero(), tail, sub(fill(1.0f), tail));
  return select_less(z, fill(1.0f), near, far);
}

}  // namespace blockllm
