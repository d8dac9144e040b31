// The loss of one cell: its kind, its weights, the error of an element and the gradient of that.
// All compiled arithmetic of the loss is here, for the host and the device; what stands around it
// only brings elements in and takes results out. fcrn_fused/reference.py says the same for people.
//
// A positive cell has a target confidence above 0, a negative one does not, an ignored one has the
// confidence that the caller gave for that. With w the weight of an element,
//   E = w * (pred - target)^2   and   dloss/dpred = 2 * w * (pred - target) * dloss/dE.
// Elements of weight 0 by their kind must be left out by a choice, not a product: 0 * NaN is NaN.
//
// `Value` is a scalar or, in the CPU's loops, a vector of them; a comparison of vectors is a mask.
#pragma once

#include "scalar_types.h"

namespace fcrn {

// Weights and the ignored confidence, rounded to what confidences are compared in; NaN, which is
// equal to nothing, where no confidence is to be ignored.
template <typename Acc>
struct CellRule {
  Acc ignore_value;
  Acc negative_weight, positive_weight;
};

// The confidence of the cell counts: the cell is positive or negative.
template <typename Acc, typename Value>
FCRN_HD auto is_counted(const CellRule<Acc>& rule, Value target_confidence) {
  return target_confidence != rule.ignore_value;
}

// The pose of the cell counts as well.
template <typename Acc, typename Value>
FCRN_HD auto is_positive(const CellRule<Acc>& rule, Value target_confidence) {
  return (target_confidence > Acc(0)) & (target_confidence != rule.ignore_value);
}

template <typename Value>
FCRN_HD Value weighted_error(Value weight, Value difference) {
  return weight * (difference * difference);
}

// 2 * w * dloss/dE: a gradient is this times the difference. Taken in double and rounded once, so
// that a gradient carries three roundings in all.
FCRN_HD double gradient_coefficient(double weight, double dloss_derror) {
  return 2.0 * weight * dloss_derror;
}

template <typename Value>
FCRN_HD Value gradient(Value coefficient, Value difference) {
  return coefficient * difference;
}

template <typename Acc, typename Pred, typename Target>
FCRN_HD Acc difference(Pred pred, Target target) {
  return Convert<Acc>::from(pred) - Convert<Acc>::from(target);
}

}  // namespace fcrn
