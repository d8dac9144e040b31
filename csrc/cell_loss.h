// The rule and the arithmetic of one element: its kind, its weight, its error and its gradient, and
// the constants of a pass. Every loop on every device calls this and decides nothing itself.
// fcrn_fused/reference.py says the same for people.
//
// A cell is ignored if its confidence is the one that the caller named for that, else positive if
// its confidence is above 0, or if the caller says so, else negative. Without kinds every element
// is that of a positive cell's pose. With w the weight of an element by its cell's kind, times the
// one that the caller gave it,
//   E = w * (pred - target)^2   and   dloss/dpred = 2 * w * dloss/dE * (pred - target).
// Elements without a weight, or with one of 0 from the caller, are masked by a choice, not by a
// product: 0 * NaN is NaN.
//
// `Value` is a scalar or, in the CPU's loops, a vector of them; a comparison of vectors is a mask.
#pragma once

#include "scalar_types.h"

namespace fcrn {

// The weight of an element, and 2 * w * dloss/dE, which times the difference is its gradient.
template <typename Value>
struct ElementWeight {
  Value weight, coefficient;

  // The coefficient is computed in double and rounded once: a gradient carries three roundings.
  FCRN_HD static ElementWeight of(double weight, double dloss_derror) {
    return {static_cast<Value>(weight), static_cast<Value>(2.0 * weight * dloss_derror)};
  }
};

// What is the same for all elements of a pass, in the type of the arithmetic.
template <typename Value>
struct PassConstants {
  double dloss_derror;  // but for a grad_output that differs from cell to cell
  Value ignore_value;   // NaN, which is equal to nothing, where no confidence is to be ignored
  ElementWeight<Value> negative, positive;  // of the confidence; the pose has one for each map
};

// Whether the confidence of a cell counts, and whether its pose does too.
template <typename Mask>
struct Kind {
  Mask counted, positive;
};

template <typename Value, typename Mask>
FCRN_HD Kind<Mask> kind_of(const PassConstants<Value>& constants, Value confidence,
                           Mask is_positive) {
  const Mask counted = confidence != constants.ignore_value;
  return {counted, static_cast<Mask>(is_positive & counted)};
}

template <typename Value>
FCRN_HD auto kind_of(const PassConstants<Value>& constants, Value confidence) {
  return kind_of(constants, confidence, confidence > Value{});
}

template <typename Value, typename Mask>
FCRN_HD ElementWeight<Value> confidence_weight(const PassConstants<Value>& constants,
                                               const Kind<Mask>& kind) {
  return {kind.positive ? constants.positive.weight : constants.negative.weight,
          kind.positive ? constants.positive.coefficient : constants.negative.coefficient};
}

// The weight that the caller gave an element.
template <typename Value, typename Mask>
FCRN_HD void apply_weight(Value given, ElementWeight<Value>& weight, Mask& counted) {
  counted = static_cast<Mask>(counted & (given != Value{}));
  weight.weight *= given;
  weight.coefficient *= given;
}

template <typename Value>
struct Element {
  Value error, gradient;
};

template <typename Value, typename Mask>
FCRN_HD Element<Value> element(Mask counted, const ElementWeight<Value>& weight, Value difference) {
  return {counted ? weight.weight * (difference * difference) : Value{},
          counted ? weight.coefficient * difference : Value{}};
}

}  // namespace fcrn
