// What the machine can do at most, on one thread: bytes read, and products of float32 or
// bfloat16 summed in float32, per call.
// bench/kernels.py compiles this, calls it from as many threads as it measures with, and times it.
#include "vec.h"

using namespace blockllm;

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

// Independent sums: as many as hide a multiply-add's latency and fit the registers.
constexpr int kSums = kLanes == 16 ? 24 : 12;

// Repeats a step upon independent sums, all in registers.
template <class Step>
static float repeat(int64_t rounds, const Step& step) {
  Vec sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = fill(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = step(sums[i]);
  }
  for (int i = 1; i < kSums; ++i) sums[0] = add(sums[0], sums[i]);
  return sum(sums[0]);
}

// Multiply-adds of float32; a round has `limits_operations` of them, two for each lane.
extern "C" float limits_multiply_add(int64_t rounds) {
  const Vec factor = fill(0.999f), term = fill(1e-3f);
  return repeat(rounds, [&](Vec sum) { return fma(sum, factor, term); });
}

extern "C" int64_t limits_operations() { return kSums * kLanes * 2; }

// The same of pairs of bfloat16s, twice as many; returns false where there are none.
extern "C" bool limits_dots(int64_t rounds) {
#if defined(__AVX512BF16__)
  const __m512bh pairs = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  volatile float kept = repeat(rounds, [&](Vec sum) { return _mm512_dpbf16_ps(sum, pairs, pairs); });
  (void)kept;
  return true;
#else
  return rounds < 0;
#endif
}
