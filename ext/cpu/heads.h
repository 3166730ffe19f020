// One head of a row: normalization and rotary position.
#pragma once
#include "norm.h"
#include "records.h"

namespace blockllm {

// Turns the pairs (x[i], x[i + half]), or the neighbours (x[2 i], x[2 i + 1]), in place.
inline void rotate(const Rotary& rotary, int64_t position, float* x) {
  const int64_t half = rotary.half;
  const float* cosine = rotary.table + position * 2 * half;
  const float* sine = cosine + half;
  if (rotary.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosine[i] - b * sine[i];
      x[2 * i + 1] = b * cosine[i] + a * sine[i];
    }
    return;
  }
  float* __restrict first = x;
  float* __restrict second = x + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = first[i], b = second[i];
    first[i] = a * cosine[i] - b * sine[i];
    second[i] = b * cosine[i] + a * sine[i];
  }
}

inline void prepare_head(const Norm& norm, const Rotary* rotary, int64_t position,
                         const float* from, int64_t dim, float* to) {
  normalize(norm, from, dim, to);
  if (rotary != nullptr) rotate(*rotary, position, to);
}

}  // namespace blockllm
