// The loss of one cell: its kind, its weights, the error of an element and the gradient of that.
// All compiled arithmetic of the loss is here, for the host and the device; what stands around it
// only brings elements in and takes results out. fcrn_fused/reference.py says the same for people.
//
// A positive cell has a target confidence above 0, a negative one does not, an ignored one has the
// confidence that the caller gave for that. With w the weight of an element,
//   E = w * (pred - target)^2   and   dloss/dpred = 2 * w * (pred - target) * dloss/dE.
// Elements of weight 0 by their kind must not get here: 0 * NaN is NaN.
#pragma once

#include "scalar_types.h"

namespace fcrn {

enum class CellKind : int32_t { ignored, negative, positive };

template <typename Acc>
struct CellRule {
  bool has_ignore_value;
  Acc ignore_value;  // rounded to the dtype that confidences are compared in
  Acc negative_weight, positive_weight;
};

template <typename Acc>
FCRN_HD CellKind cell_kind(const CellRule<Acc>& rule, Acc target_confidence) {
  if (rule.has_ignore_value && target_confidence == rule.ignore_value) return CellKind::ignored;
  return target_confidence > Acc(0) ? CellKind::positive : CellKind::negative;
}

template <typename Acc>
FCRN_HD Acc confidence_weight(const CellRule<Acc>& rule, CellKind kind) {
  return kind == CellKind::positive ? rule.positive_weight : rule.negative_weight;
}

template <typename Acc, typename Pred, typename Target>
FCRN_HD Acc difference(Pred pred, Target target) {
  return Convert<Acc>::from(pred) - Convert<Acc>::from(target);
}

template <typename Acc>
FCRN_HD Acc weighted_error(Acc weight, Acc difference) {
  return weight * (difference * difference);
}

// 2 * w * dloss/dE: a gradient is this times the difference. Taken in double and rounded once, so
// that a gradient carries three roundings in all.
FCRN_HD double gradient_coefficient(double weight, double dloss_derror) {
  return 2.0 * weight * dloss_derror;
}

template <typename Acc>
FCRN_HD Acc gradient(Acc coefficient, Acc difference) {
  return coefficient * difference;
}

}  // namespace fcrn
