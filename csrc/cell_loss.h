// The rule and the arithmetic of one element: the kind of its cell, its weight, its error and its
// gradient. All loops on all devices call this; fcrn_fused/reference.py is the same in PyTorch.
//
// A cell is ignored if its target confidence equals ignore_value, else positive if the confidence
// is above 0 (or if the tensor `positive` says so), else negative. Without kinds, all elements
// count as pose of positive cells. With w the weight of the element by the kind of its cell, times
// its weight in the tensor `weight`,
//   E = w * (pred - target)^2   and   dloss/dpred = 2 * w * dloss/dE * (pred - target).
// Masked elements are selected, not multiplied by 0: 0 * NaN is NaN.
//
// `Value` is a scalar or, in the CPU loops, a vector; a comparison of vectors gives a mask.
#pragma once

#include "scalar_types.h"

namespace fcrn {

// The weight w of an element, and 2 * w * dloss/dE, the factor of pred - target in its gradient.
template <typename Value>
struct ElementWeight {
  Value weight, coefficient;

  // Computed in double and rounded once, so that a gradient is rounded three times in all.
  FCRN_HD static ElementWeight of(double weight, double dloss_derror) {
    return {static_cast<Value>(weight), static_cast<Value>(2.0 * weight * dloss_derror)};
  }
};

// The constants of a pass, in the type of the arithmetic.
template <typename Value>
struct PassConstants {
  double dloss_derror;  // without a grad_output that differs from cell to cell
  Value ignore_value;   // NaN, which equals nothing, if no confidence is ignored
  ElementWeight<Value> negative, positive;  // of the confidence
};

// Whether a cell is not ignored, so its confidence counts, and is positive, so its pose does too.
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

// Multiplies by the element's weight in the tensor `weight`.
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
