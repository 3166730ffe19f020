// How a weight [out, in] lies in memory: panels of kPanel outputs, each [in][kPanel], the last one
// padded with zeros. Elements keep their 2 or 4 bytes. bfloat16 panels pair output c with output
// c + kLanes in one 32-bit word, so that one shift and one mask widen a whole vector each.
#pragma once
#include <cstddef>
#include <cstring>

#include "records.h"
#include "vec.h"

namespace blockllm {

constexpr int64_t kPanel = 2 * kLanes;

inline int64_t panels_of(int64_t out) { return (out + kPanel - 1) / kPanel; }

struct Float32 {
  using Element = uint32_t;
  static int64_t column(int64_t c) { return c; }
  static void widen(const Element* p, Vec& low, Vec& high) {
    const float* f = reinterpret_cast<const float*>(p);
    low = load(f);
    high = load(f + kLanes);
  }
  static float value(Element bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
};

struct BFloat16 {
  using Element = uint16_t;
  static int64_t column(int64_t c) { return c % kLanes * 2 + c / kLanes; }
  static void widen(const Element* p, Vec& low, Vec& high) {
    bfloat_pairs(reinterpret_cast<const uint32_t*>(p), low, high);
  }
  static float value(Element bits) { return Float32::value(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  using Element = uint16_t;
  static int64_t column(int64_t c) { return c; }
  static void widen(const Element* p, Vec& low, Vec& high) {
    low = half_to_float(p);
    high = half_to_float(p + kLanes);
  }
  static float value(Element bits) { return _cvtsh_ss(bits); }
};

// Calls body with the type that describes the storage.
template <class Body>
void with_storage(Storage storage, Body&& body) {
  switch (storage) {
    case Storage::kF32:
      return body(Float32{});
    case Storage::kBF16:
      return body(BFloat16{});
    case Storage::kF16:
      return body(Float16{});
  }
}

}  // namespace blockllm
