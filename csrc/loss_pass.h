// One pass over the cells: what it reads, the rule, and what it writes. This is the argument of the
// CPU and the CUDA kernels.
#pragma once

#include <cmath>

#include "cell_loss.h"
#include "tensor_view.h"

namespace fcrn {

// The loss is one number, the mean over the maps of each cell, or E itself.
enum class Output : int32_t { scalar, cell, element };

// A number, or a 0-dim tensor that is read on its device.
struct Number {
  const void* data = nullptr;  // nullptr: the number
  DType dtype = DType::float32;
  double number = 1.0;

  FCRN_HD double value() const { return data ? load_as<double>(data, dtype, 0) : number; }
};

constexpr int kInlineCoordWeights = 32;

// The weights of the pose maps: `count` numbers or tensor elements, one per map or one for all.
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

// Whether the arithmetic, the loss and the sums are float64 instead of float32.
FCRN_HD bool is_double(DType pred, DType target) {
  return pred == DType::float64 || target == DType::float64;
}

// The sums of a pass or of a part of it: the parts of E and the number of positive cells.
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

// What the mean of weighted elements is divided by: without any weight the mean is 0.
FCRN_HD double divisor_of_mean(double weight_sum, int64_t repeats) {
  return weight_sum == 0 ? HUGE_VAL : weight_sum * static_cast<double>(repeats);
}

struct LossPass {
  Grid grid;
  TensorView pred, target;
  bool has_kinds = true;      // the last map is the confidence; false: all maps are pose maps
  TensorView kinds;           // the target confidences
  TensorView positive;        // bool, (B, *S): which cells are positive; absent: confidence above 0
  TensorView weight;          // of each element; absent: 1
  int64_t weight_repeat = 1;  // how many neighbours in the last dimension share a weight

  Number negative_weight;
  double positive_weight = 1.0;
  CoordWeights coord_weights;
  double ignore_value = NAN;  // in the precision of `kinds`; NaN: no cell is ignored

  Output output = Output::scalar;
  double divisor = 1.0;  // of the sum of E; negative: the number of positive cells, at least 1
  const double* known_divisor = nullptr;  // on the device; replaces `divisor`

  // The results, each absent if not wanted.
  TensorView errors;  // E, or its mean over the maps, (B, *S), with map_stride 0
  TensorView grad;
  void* loss = nullptr;  // scalars in the dtype of the arithmetic
  void* coord = nullptr;
  void* positive_conf = nullptr;
  void* negative_conf = nullptr;
  int64_t* num_positive = nullptr;

  // Inputs of a backward pass.
  TensorView grad_output;                   // absent: 1
  const int64_t* known_positive = nullptr;  // the count of the forward pass, if `divisor` < 0
  bool wrt_target = false;                  // dloss/dtarget is -dloss/dpred
  bool grad_is_for_one = false;  // `grad` holds the gradient for a grad_output of 1, not divided by
                                 // the number of cells: write only elements that may change

  // Kinds by the confidence alone, and no tensor of weights.
  FCRN_HD bool is_plain() const { return has_kinds && !positive && !weight; }
  FCRN_HD int64_t num_pose_maps() const { return has_kinds ? grid.maps - 1 : grid.maps; }

  // The offset of the weight of map 0 of a cell.
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

  // dloss/dE; in a forward pass for a grad_output of 1, not divided by the number of cells.
  FCRN_HD double dloss_derror() const {
    const double value = grad_output && output == Output::scalar
                             ? load_as<double>(grad_output.data, grad_output.dtype, 0)
                             : 1.0;
    return divided(wrt_target ? -value : value, known_positive ? *known_positive : 1);
  }

  // `grad` needs no correction.
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

  // Writes the loss and its parts, given the sums over all cells.
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

  // Whether `check` holds for pred, target, grad, errors and a grad_output per cell.
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
