// The largest of each row of logits.
#include <algorithm>
#include <limits>

#include "exports.h"
#include "vec.h"

namespace blockllm {
namespace {

float row_maximum(const float* x, int64_t width) {
  Vec top = fill(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) top = max(top, load(x + i));
  float best = largest(top);
  for (; i < width; ++i) best = std::max(best, x[i]);
  return best;
}

int64_t first_of(const float* x, int64_t width, float value) {
  for (int64_t i = 0; i < width; ++i)
    if (x[i] == value) return i;
  return 0;
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_argmax(Pool* pool, const ArgmaxCall* call) {
  pool->run(call->rows, [&](int64_t row) {
    const float* x = call->logits + row * call->width;
    call->ids[row] = first_of(x, call->width, row_maximum(x, call->width));
  });
}
