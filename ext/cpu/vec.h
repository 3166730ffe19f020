// The widest float vector of the target: the kernels are written once upon these few operations and
// the library is compiled once per instruction set (AVX2 + FMA + F16C; AVX-512 F/BW/VL/DQ; with that
// its products of bfloat16s; with those AMX).
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace blockllm {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // 12 x 2 sums, 2 weights, 1 activation: 27 of 32 registers
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec fill(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
// Past the caches; `p` is aligned to a vector.
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// 1 / a, wrong by 1.2e-7 of it at most: an estimate and a step of Newton's, of half the cost of a
// division.
inline Vec reciprocal(Vec a) {
  const Vec y = _mm512_rcp14_ps(a);
  return fma(y, _mm512_fnmadd_ps(a, y, fill(1.0f)), y);
}
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a < b ? x : y
inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
// One bit per lane: a > b.
inline uint32_t greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// x * 2^n for whole n in [-126, 127]
inline Vec scale_pow2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
inline Vec half_to_float(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec bfloat_to_float(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
// kLanes words, each of two bfloat16: the low halves and the high halves as floats.
inline void bfloat_pairs(__m512i words, Vec& low, Vec& high) {
  low = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  high =
      _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline Vec bytes_to_float(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
// kLanes bytes, each of two numbers of 4 bits: the low halves and the high halves as floats.
inline void nibble_pairs(const uint8_t* p, Vec& low, Vec& high) {
  const __m512i words =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  // A look-up takes the low four bits of each word, and costs less than a mask and a conversion.
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  low = _mm512_permutexvar_ps(words, numbers);
  high = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), numbers);
}

using Bytes = __m512i;

inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes x) { _mm512_storeu_si512(p, x); }
// 16 bytes, once in every 16.
inline Bytes repeat_bytes(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Of 16 bytes that are repeated, those of the given numbers.
inline Bytes look_up(Bytes table, Bytes numbers) { return _mm512_shuffle_epi8(table, numbers); }
inline Bytes low_halves(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_halves(Bytes x) { return low_halves(_mm512_srli_epi16(x, 4)); }
// Words of a low and a high byte: of the first and of the last 8 of every 16.
inline Bytes pair_low(Bytes low, Bytes high) { return _mm512_unpacklo_epi8(low, high); }
inline Bytes pair_high(Bytes low, Bytes high) { return _mm512_unpackhi_epi8(low, high); }

inline __m256 fold(Vec a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
inline __m256 fold_max(Vec a) {
  return _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

#else

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 sums, 2 weights, 1 activation: 15 of 16 registers
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec fill(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec reciprocal(Vec a) { return div(_mm256_set1_ps(1.0f), a); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec round(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline uint32_t greater(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
inline Vec scale_pow2(Vec x, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Vec half_to_float(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec bfloat_to_float(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline void bfloat_pairs(__m256i words, Vec& low, Vec& high) {
  low = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  high =
      _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline Vec bytes_to_float(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline void nibble_pairs(const uint8_t* p, Vec& low, Vec& high) {
  const __m256i words =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  low = _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(15)));
  high = _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 4));
}

using Bytes = __m256i;

inline Bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_bytes(void* p, Bytes x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline Bytes repeat_bytes(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bytes look_up(Bytes table, Bytes numbers) { return _mm256_shuffle_epi8(table, numbers); }
inline Bytes low_halves(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Bytes high_halves(Bytes x) { return low_halves(_mm256_srli_epi16(x, 4)); }
inline Bytes pair_low(Bytes low, Bytes high) { return _mm256_unpacklo_epi8(low, high); }
inline Bytes pair_high(Bytes low, Bytes high) { return _mm256_unpackhi_epi8(low, high); }

inline __m256 fold(Vec a) { return a; }
inline __m256 fold_max(Vec a) { return a; }

#endif

// What was written by `stream` is there for other threads from here on.
inline void fence_streams() { _mm_sfence(); }

inline float sum(Vec v) {
  const __m256 a = fold(v);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline float largest(Vec v) {
  const __m256 a = fold_max(v);
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// The sums of four vectors, in order.
inline __m128 sums(Vec a, Vec b, Vec c, Vec d) {
  const __m256 ab = _mm256_hadd_ps(fold(a), fold(b));
  const __m256 cd = _mm256_hadd_ps(fold(c), fold(d));
  const __m256 all = _mm256_hadd_ps(ab, cd);
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

}  // namespace blockllm
