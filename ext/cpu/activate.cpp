// act(gate) * up, element by element.
#include "activation.h"
#include "exports.h"

namespace blockllm {
namespace {

constexpr int64_t kGrain = 8192;  // elements per task: a few microseconds

template <Act kind>
void activate_vector(const float* gate, const float* up, float* out) {
  const Vec y = load(up);
  store(out, gate == nullptr ? act<kind>(y) : mul(act<kind>(load(gate)), y));
}

template <Act kind>
void activate_span(const ActivateCall& call, int64_t first, int64_t last) {
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) {
    activate_vector<kind>(call.gate == nullptr ? nullptr : call.gate + i, call.up + i,
                          call.out + i);
  }
  if (i == last) return;
  float gate[kLanes] = {}, up[kLanes] = {}, out[kLanes];
  for (int64_t j = i; j < last; ++j) {
    up[j - i] = call.up[j];
    if (call.gate != nullptr) gate[j - i] = call.gate[j];
  }
  activate_vector<kind>(call.gate == nullptr ? nullptr : gate, up, out);
  for (int64_t j = i; j < last; ++j) call.out[j] = out[j - i];
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_activate(Pool* pool, const ActivateCall* call) {
  pool->run((call->count + kGrain - 1) / kGrain, [&](int64_t task) {
    const int64_t first = task * kGrain;
    const int64_t last = first + kGrain < call->count ? first + kGrain : call->count;
    with_act(call->kind,
             [&](auto kind) { activate_span<decltype(kind)::value>(*call, first, last); });
  });
}
