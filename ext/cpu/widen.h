// A run of one panel as float32, which pays where several groups of rows read it.
#pragma once
#include "scratch.h"
#include "tile.h"

namespace blockllm {

// Inputs per pass: so that a panel's run stays in the first-level cache.
constexpr int64_t kRun = 256;

template <class T>
const uint32_t* widen(const typename T::Element* from, int64_t run) {
  float* wide = scratch<kWidened>(kRun * kPanel);
  for (int64_t k = 0; k < run; ++k) {
    Vec low, high;
    T::widen(from + k * kElements<T>, low, high);
    store(wide + k * kPanel, low);
    store(wide + k * kPanel + kLanes, high);
  }
  return reinterpret_cast<const uint32_t*>(wide);
}

}  // namespace blockllm
