// Operations on whole rows: adding what was normed, multiplying by vectors, taking rows apart.
#include <algorithm>
#include <cstring>

#include "exports.h"
#include "norm.h"
#include "scratch.h"

namespace blockllm {
namespace {

constexpr int64_t kGrain = 16384;  // elements per task

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_add_norm(Pool* pool, const AddNormCall* call) {
  const int64_t width = call->width, rows = std::max<int64_t>(1, kGrain / width);
  pool->run((call->rows + rows - 1) / rows, [&](int64_t task) {
    float* normed = scratch<kRows>(width);
    for (int64_t r = task * rows; r < std::min(call->rows, (task + 1) * rows); ++r) {
      normalize(norm_of(call->norm, r), call->y + r * width, width, normed);
      float* x = call->x + r * width;
      for (int64_t i = 0; i < width; ++i) x[i] += normed[i];
    }
  });
}

void blockllm_scale(Pool* pool, const ScaleCall* call) {
  pool->run(call->count, [&](int64_t task) {
    const Gain& gain = call->gains[task];
    for (int64_t r = gain.first; r < gain.last; ++r) {
      float* x = call->x + r * call->width;
      for (int64_t i = 0; i < call->width; ++i) x[i] *= gain.vector[i];
    }
  });
}

void blockllm_split(Pool* pool, const SplitCall* call) {
  int64_t width = 0;
  for (int64_t p = 0; p < call->count; ++p) width += call->parts[p].width;
  const int64_t stride = call->groups * width, rows = std::max<int64_t>(1, kGrain / stride);
  pool->run((call->rows + rows - 1) / rows, [&](int64_t task) {
    for (int64_t r = task * rows; r < std::min(call->rows, (task + 1) * rows); ++r) {
      const float* from = call->y + r * stride;
      for (int64_t g = 0; g < call->groups; ++g) {
        for (int64_t p = 0; p < call->count; ++p) {
          const SplitPart& part = call->parts[p];
          std::memcpy(part.out + (r * call->groups + g) * part.width, from,
                      static_cast<size_t>(part.width) * sizeof(float));
          from += part.width;
        }
      }
    }
  });
}
