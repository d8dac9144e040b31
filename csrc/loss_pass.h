// One pass over the cells: what is read, by which rule, and what is to be written. The CPU and the
// CUDA kernels both take this; a pass that writes no sums is a backward pass.
#pragma once

#include <cmath>

#include "cell_loss.h"
#include "tensor_view.h"

namespace fcrn {

// What a pass gives the caller of E: one number, the mean over the maps of each cell, or E itself.
enum class Output : int32_t { scalar, cell, element };

// A number, or a tensor of one that is read where the kernel runs.
struct Number {
  const void* data = nullptr;  // nullptr: the number
  DType dtype = DType::float32;
  double number = 1.0;

  FCRN_HD double value() const { return data ? load_as<double>(data, dtype, 0) : number; }
};

// Weights of the pose maps: `count` numbers or tensor elements, one for each map or one for all.
constexpr int kInlineCoordWeights = 32;

struct CoordWeights {
  const void* data = nullptr;  // nullptr: the numbers
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
  bool has_kinds = true;  // of cells, by a last map of confidences; else every map is a pose map
  TensorView kinds;       // those confidences
  TensorView positive;    // which cells are positive, one map of bool; absent: those above 0
  TensorView weight;      // of each element; absent: 1
  int64_t weight_repeat = 1;  // so many cells of the last dimension have one weight

  Number negative_weight;
  double positive_weight = 1.0;
  CoordWeights coord_weights;
  double ignore_value = NAN;  // rounded to the dtype of `kinds`; NaN: no cell is ignored

  Output output = Output::scalar;
  double divisor = 1.0;  // of the sum of E; below 0: the number of positive cells, at least 1
  const double* known_divisor = nullptr;  // takes its place, read where the kernel runs

  // What is written; what has no pointer is not wanted.
  TensorView errors;  // E, or its mean over the maps: (B, *S), whose map_stride is 0
  TensorView grad;
  void* loss = nullptr;  // scalars in the dtype of the arithmetic
  void* coord = nullptr;
  void* positive_conf = nullptr;
  void* negative_conf = nullptr;
  int64_t* num_positive = nullptr;

  // Of a backward pass.
  TensorView grad_output;                   // absent: 1
  const int64_t* known_positive = nullptr;  // where `divisor` counts: what it counted
  bool wrt_target = false;                  // dloss/dtarget is -dloss/dpred
  bool grad_is_for_one = false;  // `grad` holds the gradient for a grad_output of 1 (undivided
                                 // by a number of cells): only what may change is to be written

  // Kinds by the confidence, and no weight of the caller's.
  FCRN_HD bool is_plain() const { return has_kinds && !positive && !weight; }
  FCRN_HD int64_t num_pose_maps() const { return has_kinds ? grid.maps - 1 : grid.maps; }

  // Where the weight of map 0 of a cell lies.
  template <typename Index>
  FCRN_HD Index weight_offset(Index image, Index cell) const {
    if (weight_repeat == 1) return weight.cell_offset(grid, image, cell);
    const int last = grid.spatial_dims - 1;
    const Index along_last = cell % static_cast<Index>(grid.sizes[last]);
    return weight.cell_offset(grid, image, cell - along_last) +
           along_last / static_cast<Index>(weight_repeat) *
               static_cast<Index>(weight.cell_strides[last]);
  }

  FCRN_HD bool wants_sums() const { return loss || coord || num_positive; }
  FCRN_HD bool is_forward() const { return wants_sums() || errors; }
  FCRN_HD bool has_grad_output_per_cell() const { return grad_output && output != Output::scalar; }

  FCRN_HD double divided(double value, int64_t positives) const {
    const auto counted = static_cast<double>(positives > 1 ? positives : 1);
    return value / (known_divisor ? *known_divisor : divisor < 0 ? counted : divisor);
  }

  // dloss/dE; a forward pass takes grad_output for 1 and does not know the positive cells.
  FCRN_HD double dloss_derror() const {
    const double value = grad_output && output == Output::scalar
                             ? load_as<double>(grad_output.data, grad_output.dtype, 0)
                             : 1.0;
    return divided(wrt_target ? -value : value, known_positive ? *known_positive : 1);
  }

  // `grad` is right as it is.
  FCRN_HD bool has_nothing_to_do() const {
    return grad_is_for_one && dloss_derror() == divided(1.0, 1);
  }

  template <typename Acc>
  FCRN_HD PassConstants<Acc> constants() const {
    const double slope = dloss_derror();
    return {slope, static_cast<Acc>(ignore_value),
            ElementWeight<Acc>::of(negative_weight.value(), slope),
            ElementWeight<Acc>::of(positive_weight, slope)};
  }

  // Writes the sums of the whole pass and the loss, in the type of the arithmetic.
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
    write(loss, divided(total, sums.num_positive));
  }

  // Whether `check` holds for every tensor of the pass (`kinds` is a map of one of them).
  template <typename Check>
  bool all_views(Check&& check) const {
    const TensorView* const views[] = {&pred, &target, &grad, &errors};
    for (const TensorView* view : views) {
      if (*view && !check(*view)) return false;
    }
    return !has_grad_output_per_cell() || check(grad_output);
  }
};

}  // namespace fcrn
