// Choosing among logits without sorting them: argmax, the k largest, log-sum-exp.
#include <algorithm>
#include <cmath>
#include <limits>

#include "curves.h"
#include "exports.h"
#include "scratch.h"

namespace blockllm {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

float row_maximum(const float* x, int64_t width) {
  Vec top = fill(kLowest);
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

struct Candidate {
  float value;
  int64_t id;
};

// Larger values first, equal ones by lower id.
bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The k best of the values seen so far: a value is kept aside if it exceeds the k-th best known; a
// full buffer is cut back to k, which raises that bound. A later value equal to the bound has a
// higher id than the k kept, so it never belongs to them.
class Best {
 public:
  explicit Best(int64_t k) : k_(k), kept_(scratch<kChosen, Candidate>(capacity())) {}

  float bound() const { return bound_; }

  void offer(float value, int64_t id) {
    if (count_ >= k_ && !(value > bound_)) return;
    kept_[count_++] = {value, id};
    if (count_ == capacity())
      cut();
    else if (count_ == k_)
      bound_ = std::min_element(kept_, kept_ + k_, lower)->value;
  }

  const Candidate* sorted() {
    cut();
    std::sort(kept_, kept_ + count_, before);
    return kept_;
  }

 private:
  static bool lower(const Candidate& a, const Candidate& b) { return a.value < b.value; }
  int64_t capacity() const { return 2 * k_ + 64; }

  void cut() {
    if (count_ <= k_) return;
    std::nth_element(kept_, kept_ + (k_ - 1), kept_ + count_, before);
    count_ = k_;
    bound_ = kept_[k_ - 1].value;
  }

  int64_t k_;
  Candidate* kept_;
  int64_t count_ = 0;
  float bound_ = kLowest;
};

void top_k_row(const SelectCall& call, int64_t row) {
  const float* x = call.logits + row * call.width;
  Best best(call.k);
  int64_t i = 0;
  for (; i < call.k; ++i) best.offer(x[i], i);
  for (; i + kLanes <= call.width; i += kLanes) {
    for (uint32_t hits = greater(load(x + i), fill(best.bound())); hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      best.offer(x[i + lane], i + lane);
    }
  }
  for (; i < call.width; ++i) best.offer(x[i], i);
  const Candidate* sorted = best.sorted();
  for (int64_t j = 0; j < call.k; ++j) {
    call.values[row * call.k + j] = sorted[j].value;
    call.ids[row * call.k + j] = sorted[j].id;
  }
}

float log_sum_exp_row(const float* x, int64_t width) {
  const float top = row_maximum(x, width);
  if (!std::isfinite(top)) return top;
  const Vec shift = fill(top);
  Vec all = zero();
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) all = add(all, exp(sub(load(x + i), shift)));
  double total = sum(all);
  for (; i < width; ++i) total += std::exp(x[i] - top);
  return top + static_cast<float>(std::log(total));
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_argmax(Pool* pool, const SelectCall* call) {
  pool->run(call->rows, [&](int64_t row) {
    const float* x = call->logits + row * call->width;
    call->ids[row] = first_of(x, call->width, row_maximum(x, call->width));
  });
}

void blockllm_top_k(Pool* pool, const SelectCall* call) {
  pool->run(call->rows, [&](int64_t row) { top_k_row(*call, row); });
}

void blockllm_log_sum_exp(Pool* pool, const SelectCall* call) {
  pool->run(call->rows, [&](int64_t row) {
    call->values[row] = log_sum_exp_row(call->logits + row * call->width, call->width);
  });
}
