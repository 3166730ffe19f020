// What the machine can do at most, on one thread: bytes read and float32 multiply-adds per call.
// bench/kernels.py compiles this, calls it from as many threads as it measures with, and times it.
#include <immintrin.h>

#include <cstdint>

// Reads `bytes` (a multiple of 128) once, in order.
extern "C" int64_t limits_read(const char* from, int64_t bytes) {
  __m256i sums[4] = {};
  for (const char* at = from; at < from + bytes; at += 128) {
    _mm_prefetch(at + 2048, _MM_HINT_T0);
    _mm_prefetch(at + 2112, _MM_HINT_T0);
    for (int i = 0; i < 4; ++i)
      sums[i] = _mm256_xor_si256(sums[i],
                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * i)));
  }
  const __m256i all =
      _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
  return _mm256_extract_epi64(all, 0);
}

// 12 x 8 independent multiply-adds per round, all in registers.
extern "C" float limits_multiply_add(int64_t rounds) {
  __m256 sums[12];
  for (int i = 0; i < 12; ++i) sums[i] = _mm256_set1_ps(static_cast<float>(i));
  const __m256 factor = _mm256_set1_ps(0.999f), term = _mm256_set1_ps(1e-3f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = _mm256_fmadd_ps(sums[i], factor, term);
  }
  for (int i = 1; i < 12; ++i) sums[0] = _mm256_add_ps(sums[0], sums[i]);
  return _mm256_cvtss_f32(sums[0]);
}
