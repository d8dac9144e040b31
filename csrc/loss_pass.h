// One pass over the cells: what is read, by which rule, and what is to be written. The CPU and the
// CUDA kernels both take this; a pass that writes no sums is a backward pass.
#pragma once

#include <cmath>

#include "cell_loss.h"
#include "tensor_view.h"

namespace fcrn {

// In the order of REDUCTIONS in fcrn_fused/validation.py.
enum class Reduction : int32_t { mean, sum, batchmean, positive, cell, none };

// A weight given as a number, or as a tensor that is read where the kernel runs.
struct Weight {
  const void* data = nullptr;  // nullptr: the number
  DType dtype = DType::float32;
  double number = 1.0;

  FCRN_HD double value() const { return data ? load_as<double>(data, dtype, 0) : number; }
};

// Weights of the pose maps: `count` numbers or tensor elements, one for each map or one for all.
constexpr int kInlineCoordWeights = 32;

struct CoordWeights {
  const void* data = nullptr;  // nullptr: the numbers
  bool data_on_host = false;
  DType dtype = DType::float64;
  int64_t stride = 0;
  int64_t count = 1;
  double numbers[kInlineCoordWeights] = {1.0};

  FCRN_HD double value(int64_t map) const {
    const int64_t index = count == 1 ? 0 : map;
    return data ? load_as<double>(data, dtype, index * stride) : numbers[index];
  }
};

// The dtype of the arithmetic, the loss and the sums: the wider of the two, at least float32.
FCRN_HD bool is_double(DType pred, DType target) {
  return pred == DType::float64 || target == DType::float64;
}

// What a part of a pass adds up: errors by their kind.
struct Sums {
  double coord = 0.0, positive_conf = 0.0, negative_conf = 0.0;
  int64_t num_positive = 0;

  FCRN_HD void add(const Sums& other) {
    coord += other.coord;
    positive_conf += other.positive_conf;
    negative_conf += other.negative_conf;
    num_positive += other.num_positive;
  }
};

struct LossPass {
  Grid grid;
  TensorView pred, target;
  // The gradient with respect to the target is that of the loss with the roles changed, but for the
  // cells' kinds: they follow from the confidences of what is then `pred`.
  bool kinds_from_pred = false;

  Weight negative_weight;
  double positive_weight = 1.0;
  CoordWeights coord_weights;
  // Rounded to the dtype of the tensor that gives the kinds; NaN: no cell is ignored.
  double ignore_value = NAN;
  Reduction reduction = Reduction::mean;

  // The sums, and the loss made of them, all of the accumulator's type; nullptr: not wanted.
  bool wants_sums = false;
  void* loss = nullptr;
  void* coord = nullptr;
  void* positive_conf = nullptr;
  void* negative_conf = nullptr;
  int64_t* num_positive = nullptr;
  TensorView errors;  // "none": E; "cell": its mean over a cell's maps, with map_stride 0

  // The gradient with respect to `pred`, of pred's dtype and layout.
  TensorView grad;
  TensorView grad_output;                   // absent: 1
  const int64_t* known_positive = nullptr;  // backward of "positive": how many cells there are
  bool grad_is_for_one = false;  // `grad` holds the gradient for a grad_output of 1 (and, for
                                 // "positive", no division): only what can differ is to be written

  // What the sum of E is divided by; "positive" divides by a number that only the pass finds out.
  FCRN_HD double divisor(int64_t positives) const {
    switch (reduction) {
      case Reduction::mean:
        return static_cast<double>(grid.images * grid.maps * grid.cells);
      case Reduction::batchmean:
        return static_cast<double>(grid.batch);
      case Reduction::positive:
        return static_cast<double>(positives > 1 ? positives : 1);
      case Reduction::cell:
        return static_cast<double>(grid.maps);
      default:
        return 1.0;
    }
  }

  // dloss/dE but for a grad_output that differs from cell to cell.
  FCRN_HD double dloss_derror(double grad_output_value) const {
    return grad_output_value / divisor(known_positive ? *known_positive : 1);
  }

  // The same in a forward pass, which takes grad_output for 1 and does not know the positive cells.
  FCRN_HD double dloss_derror_in_forward() const { return 1.0 / divisor(1); }

  FCRN_HD bool has_grad_output_per_cell() const {
    return reduction == Reduction::cell || reduction == Reduction::none;
  }

  template <typename Acc>
  FCRN_HD CellRule<Acc> rule() const {
    return {static_cast<Acc>(ignore_value), static_cast<Acc>(negative_weight.value()),
            static_cast<Acc>(positive_weight)};
  }

  // Writes the sums of the whole pass and the loss, in the accumulator's type.
  template <typename Acc>
  FCRN_HD void write_results(const Sums& sums) const {
    const auto write = [](void* to, double value) {
      if (to) *static_cast<Acc*>(to) = static_cast<Acc>(value);
    };
    write(coord, sums.coord);
    write(positive_conf, sums.positive_conf);
    write(negative_conf, sums.negative_conf);
    if (num_positive) *num_positive = sums.num_positive;
    const double total = sums.coord + sums.positive_conf + sums.negative_conf;
    write(loss, total / divisor(sums.num_positive));
  }
};

}  // namespace fcrn
