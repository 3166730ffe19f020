// Runs of rows [first, last), sorted and disjoint, that the weights of a call differ by.
#pragma once
#include <algorithm>
#include <cstdint>

namespace blockllm {

// The run that holds `row`, else the first one behind it, else `runs + count`.
template <class Run>
const Run* run_from(const Run* runs, int64_t count, int64_t row) {
  return std::upper_bound(runs, runs + count, row,
                          [](int64_t at, const Run& run) { return at < run.last; });
}

template <class Run>
bool holds(const Run* run, const Run* end, int64_t row) {
  return run != end && run->first <= row;
}

}  // namespace blockllm
