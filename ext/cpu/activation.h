// Activation functions of a vector.
#pragma once
#include <type_traits>

#include "curves.h"
#include "records.h"

namespace blockllm {

template <Act kind>
Vec act(Vec x) {
  if constexpr (kind == Act::kSilu) return mul(x, sigmoid(x));
  if constexpr (kind == Act::kGelu) return mul(x, normal_cdf(x));
  if constexpr (kind == Act::kGeluTanh) {
    // 1 + tanh(u) = 2 sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3)
    const Vec cubic = fma(mul(mul(x, x), fill(0.044715f)), x, x);
    return mul(x, sigmoid(mul(cubic, fill(1.5957691216f))));
  }
  if constexpr (kind == Act::kRelu) return select_less(x, zero(), zero(), x);
  if constexpr (kind == Act::kTanh) return tanh(x);
  return x;
}

// Calls body with the activation as a constant.
template <class Body>
void with_act(Act kind, Body&& body) {
  switch (kind) {
    case Act::kSilu:
      return body(std::integral_constant<Act, Act::kSilu>());
    case Act::kGelu:
      return body(std::integral_constant<Act, Act::kGelu>());
    case Act::kGeluTanh:
      return body(std::integral_constant<Act, Act::kGeluTanh>());
    case Act::kRelu:
      return body(std::integral_constant<Act, Act::kRelu>());
    case Act::kTanh:
      return body(std::integral_constant<Act, Act::kTanh>());
    case Act::kNone:
      return body(std::integral_constant<Act, Act::kNone>());
  }
}

}  // namespace blockllm
