// How a weight [out, in] lies in memory: panels of kPanel outputs, each [in][kPanel], the last one
// padded with zeros. Elements keep their 2 or 4 bytes. bfloat16 panels pair output c with output
// c + kLanes in one 32-bit word, so that one shift and one mask widen a whole vector each.
//
// A storage type reads elements: `widen` those of a panel; `row` (kLanes), `four` and `value` such
// as lie as they were stored.
#pragma once
#include <cstddef>
#include <cstring>

#include "records.h"
#include "vec.h"

namespace blockllm {

constexpr int64_t kPanel = 2 * kLanes;

// How weights are fetched: past the caches beyond the first, since a step reads them once and would
// push out what it reads again (activations, pages, the interpreter).
constexpr _mm_hint kOnce = _MM_HINT_NTA;

inline int64_t panels_of(int64_t out) { return (out + kPanel - 1) / kPanel; }

struct Float32 {
  using Element = uint32_t;
  static int64_t column(int64_t c) { return c; }
  static void widen(const Element* p, Vec& low, Vec& high) {
    const float* f = reinterpret_cast<const float*>(p);
    low = load(f);
    high = load(f + kLanes);
  }
  static Vec row(const Element* p) { return load(reinterpret_cast<const float*>(p)); }
  static __m128 four(const Element* p) { return _mm_loadu_ps(reinterpret_cast<const float*>(p)); }
  static void write(const float* from, int64_t count, Element* to) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
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
    bfloat_pairs(load_bytes(p), low, high);
  }
  static Vec row(const Element* p) { return bfloat_to_float(p); }
  static __m128 four(const Element* p) {
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
  }
  // To the nearest, ties to even.
  static void write(const float* from, int64_t count, Element* to) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof bits);
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      to[i] = static_cast<Element>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
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
  static Vec row(const Element* p) { return half_to_float(p); }
  static float value(Element bits) { return _cvtsh_ss(bits); }
};

// Bytes of an element of floats, whole ones or halves.
constexpr int64_t element_bytes(Storage storage) { return storage == Storage::kF32 ? 4 : 2; }

// Calls body with the type that describes a storage in panels.
template <class Body>
void with_storage(Storage storage, Body&& body) {
  switch (storage) {
    case Storage::kF32:
      return body(Float32{});
    case Storage::kBF16:
      return body(BFloat16{});
    case Storage::kF16:
      return body(Float16{});
    case Storage::kTiles:
    case Storage::kInt8:
    case Storage::kInt4:
    case Storage::kFolded:
    case Storage::kFoldedTiles:
      return;  // read by product.h, grouped.h and folded.h alone
  }
}

}  // namespace blockllm
