// RMS and layer normalization of one row; a row's sums have one order whatever stands beside it.
#pragma once
#include <cmath>

#include "records.h"
#include "runs.h"
#include "vec.h"

namespace blockllm {

inline float sum_of(const float* x, int64_t width) {
  Vec total = zero();
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) total = add(total, load(x + i));
  float rest = 0;
  for (; i < width; ++i) rest += x[i];
  return sum(total) + rest;
}

// Sum of (x - mean)^2.
inline float sum_of_squares(const float* x, int64_t width, float mean) {
  const Vec m = fill(mean);
  Vec even = zero(), odd = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const Vec a = sub(load(x + i), m), b = sub(load(x + i + kLanes), m);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  float rest = 0;
  for (; i < width; ++i) rest += (x[i] - mean) * (x[i] - mean);
  return sum(add(even, odd)) + rest;
}

// The norm with the weights of one row of the batch.
inline Norm norm_of(const Norm& norm, int64_t row) {
  Norm own = norm;
  const NormRun* run = run_from(norm.runs, norm.run_count, row);
  if (holds(run, norm.runs + norm.run_count, row)) {
    own.weight = run->weight;
    own.bias = run->bias;
  }
  return own;
}

// out = norm(x), whatever `norm.runs` say; `out` may be `x`.
inline void normalize(const Norm& norm, const float* x, int64_t width, float* out) {
  if (norm.kind == NormKind::kNone) {
    for (int64_t i = 0; i < width; ++i) out[i] = x[i];
    return;
  }
  const auto n = static_cast<float>(width);
  const float mean = norm.kind == NormKind::kLayer ? sum_of(x, width) / n : 0.0f;
  const float variance = sum_of_squares(x, width, mean) / n;
  const float inverse = 1.0f / std::sqrt(variance + static_cast<float>(norm.eps));
  const float* weight = norm.weight;
  const float* bias = norm.bias;
  if (bias == nullptr) {
    for (int64_t i = 0; i < width; ++i) out[i] = (x[i] - mean) * inverse * weight[i];
  } else {
    for (int64_t i = 0; i < width; ++i) out[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
  }
}

}  // namespace blockllm
