// Weights kept as codes of 8 or 4 bits, in groups of inputs that share a scale per output.
//
// A panel is its groups one after the other, the last one padded with zeros; a group is its scales,
// bfloat16 [kPanel], where codes are unsigned its offsets likewise, and its codes [inputs][kPanel].
// Two codes of 4 bits share a byte: output c has the low half, output c + kLanes the high one.
//
// The sums over a group are multiplied by its scales once they are whole, so the inner loop reads
// codes as plain numbers. Every row goes through its groups in one order, whatever tile it is in.
#pragma once
#include <algorithm>

#include "chunk.h"
#include "norm.h"
#include "scratch.h"
#include "tile.h"

namespace blockllm {

struct Int8 {
  using Element = uint8_t;
  static constexpr int64_t kInputs = 64;  // of a group
  static constexpr bool kOffsets = false;
  static void widen(const Element* p, Vec& low, Vec& high) {
    low = bytes_to_float(p);
    high = bytes_to_float(p + kLanes);
  }
};

struct Int4 {
  using Element = uint8_t;
  static constexpr int64_t kInputs = 32;
  static constexpr bool kOffsets = true;
  static void widen(const Element* p, Vec& low, Vec& high) { nibble_pairs(p, low, high); }
};

template <>
constexpr int64_t kElements<Int4> = kPanel / 2;
template <>
constexpr bool kMayBeCodes<Int8> = true;
template <>
constexpr bool kMayBeCodes<Int4> = true;

// Bytes of a group's scales and offsets, and of all of it.
template <class T>
constexpr int64_t kHeadBytes = (T::kOffsets ? 4 : 2) * kPanel;
template <class T>
constexpr int64_t kGroupBytes = kHeadBytes<T> + T::kInputs * kElements<T>;

inline bool is_grouped(Storage storage) {
  return storage == Storage::kInt8 || storage == Storage::kInt4;
}

// The sums of a row's inputs by groups of offset codes: to[group * rows].
inline void sum_groups(const float* x, int64_t width, int64_t rows, float* to) {
  for (int64_t k = 0; k < width; k += Int4::kInputs, to += rows)
    *to = sum_of(x + k, std::min(Int4::kInputs, width - k));
}

// Some panels of a matrix of codes, and a chunk of `rows` rows: `packed` are its packed groups,
// `row_sums` [groups of inputs] its rows' sums, `stride` apart.
struct GroupedCall {
  const Matrix& matrix;
  Rows panels;
  int64_t rows;
  const float* packed;
  const float* row_sums;
  int64_t stride;
};

// From so many groups of rows on, turning codes into floats once pays.
constexpr int64_t kRowGroupsToTurn = 2;

// The codes of a group as floats.
template <class T>
const uint32_t* turn_codes(const uint8_t* codes, int64_t run) {
  float* turned = scratch<kTurnedCodes>(T::kInputs * kPanel);
  for (int64_t k = 0; k < run; ++k) {
    Vec low, high;
    T::widen(codes + k * kElements<T>, low, high);
    store(turned + k * kPanel, low);
    store(turned + k * kPanel + kLanes, high);
  }
  return reinterpret_cast<const uint32_t*>(turned);
}

// sums[panel][row][kPanel] of the call.
template <class T>
void multiply_groups(const GroupedCall& call, float* sums) {
  const Matrix& m = call.matrix;
  const int64_t inner = ceil_div(m.in, T::kInputs), apart = inner * kGroupBytes<T>;
  const int64_t row_groups = groups_of(call.rows);
  const uint8_t* at = static_cast<const uint8_t*>(m.data) + call.panels.first * apart;
  for (int64_t j = 0; j < inner; ++j, at += kGroupBytes<T>) {
    const int64_t first = j * T::kInputs, run = std::min(T::kInputs, m.in - first);
    const uint8_t* codes = at + kHeadBytes<T>;
    const uint32_t* turned = row_groups >= kRowGroupsToTurn ? turn_codes<T>(codes, run) : nullptr;
    for (int64_t g = 0; g < row_groups; ++g) {
      const Rows group = part(call.rows, row_groups, g);
      const float* a = call.packed + group.first * m.in + first * group.count;
      float* to = sums + group.first * kPanel;
      const Stream next{reinterpret_cast<const char*>(codes) + kAhead, g == 0 ? kElements<T> : 0,
                        apart};
      const Group scale{reinterpret_cast<const uint16_t*>(at), apart / 2,
                        T::kOffsets ? call.row_sums + j * call.stride + group.first : nullptr};
      const auto tile = [&](auto type, const auto* from) {
        tile_for<decltype(type)>(group.count, call.panels.count)(
            {a, {from, apart}, run, to, call.rows * kPanel, j == 0, next, {next.at, 0, 0}, scale});
      };
      if (turned != nullptr) {
        tile(Float32{}, turned);
      } else {
        tile(T{}, codes);
      }
    }
  }
}

}  // namespace blockllm
