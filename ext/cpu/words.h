// Squares of 16 by 16 words, turned round in registers.
#pragma once
#include <immintrin.h>

namespace blockllm {

#if defined(__AVX512F__)

// Word j of x[i] becomes word i of x[j].
inline void turn_words(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // Quarter k of x[4 i + j] is word 4 k + j of four rows from 4 i on.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    const __m512i even_below = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    const __m512i odd_below = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    y[j] = _mm512_shuffle_i32x4(even, even_below, 0x88);
    y[4 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
    y[8 + j] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
    y[12 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

#endif

}  // namespace blockllm
