// The operator on every device: checks what memory safety needs and describes the pass. Included by
// ops.cpp and by cuda/, which are two libraries; speaks PyTorch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "loss_pass.h"

// One pass over pred and target, (B, C, *S). What is given of `loss` to `grad` is written: `loss`
// in the shape that `output` says, coord to num_positive 0-dim, `grad` (B, C, *S).
#define FCRN_LOSS_PASS_SCHEMA                                                                    \
  "loss_pass(Tensor pred, Tensor target, Tensor? negative_weight, Tensor? coord_weight, "        \
  "float[] numbers, float? ignore_value, int divisor, int output, Tensor? grad_output, Tensor? " \
  "known_positive, "                                                                             \
  "bool wrt_target, bool grad_is_for_one, Tensor(a!)? loss, Tensor(b!)? coord, "                 \
  "Tensor(c!)? positive_conf, Tensor(d!)? negative_conf, Tensor(e!)? num_positive, "             \
  "Tensor(f!)? grad, Tensor(g!)? workspace) -> ()"

namespace fcrn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16");
  }
}

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline double rounded_to(DType dtype, double value) {
  switch (dtype) {
    case DType::float64:
      return value;
    case DType::float32:
      return static_cast<float>(value);
    case DType::float16:
      return to_float(Convert<Half>::from(value));
    default:
      return to_float(Convert<BFloat16>::from(value));
  }
}

// Lays the tensors of a pass over one grid: takes (B, C, *S) apart into images, maps and cells, and
// merges dimensions that lie in memory as one in all of the tensors.
class GridBuilder {
 public:
  explicit GridBuilder(const Tensor& pred) : pred_(pred), sizes_(pred.sizes()) {}

  // A tensor (B, C, *S).
  void add(TensorView& view, const Tensor& tensor, const char* name) {
    const auto sizes = tensor.sizes();
    STD_TORCH_CHECK(
        sizes.size() == sizes_.size() && std::equal(sizes.begin(), sizes.end(), sizes_.begin()),
        name, " must have the shape of pred");
    view.map_stride = tensor.strides()[1];
    add_view(view, tensor, name, 0);
  }

  // A tensor (B, *S).
  void add_per_cell(TensorView& view, const Tensor& tensor, const char* name) {
    const auto sizes = tensor.sizes();
    STD_TORCH_CHECK(sizes.size() + 1 == sizes_.size() && sizes[0] == sizes_[0] &&
                        std::equal(sizes.begin() + 1, sizes.end(), sizes_.begin() + 2),
                    name, " must have the shape of pred without its maps");
    add_view(view, tensor, name, 1);
  }

  // The last map of a tensor that was added.
  void add_last_map(TensorView& view, const TensorView& of) {
    view.dtype = of.dtype;
    const int64_t offset = (sizes_[1] - 1) * of.map_stride * size_of(of.dtype);
    if (of.data) view.data = static_cast<char*>(of.data) + offset;  // an empty tensor has none
    for (int v = 0; v < num_views_; ++v) {
      if (views_[v] == &of) strides_[num_views_] = strides_[v];
    }
    views_[num_views_++] = &view;
  }

  void build(Grid& grid) const {
    grid.maps = sizes_[1];
    int64_t merged_sizes[kMaxSpatialDims + 1];
    int64_t merged_strides[kMaxViews][kMaxSpatialDims + 1] = {};
    int dims = 0;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      if (i == 1 || sizes_[i] == 1) continue;
      if (dims > 0 && continues(merged_strides, dims - 1, i)) {
        merged_sizes[dims - 1] *= sizes_[i];
        for (int v = 0; v < num_views_; ++v) merged_strides[v][dims - 1] = stride(v, i);
        continue;
      }
      STD_TORCH_CHECK(dims <= kMaxSpatialDims, "pred and target may have at most ",
                      kMaxSpatialDims + 1,
                      " dimensions that cannot be merged with a neighbour; call contiguous()");
      merged_sizes[dims] = sizes_[i];
      for (int v = 0; v < num_views_; ++v) merged_strides[v][dims] = stride(v, i);
      ++dims;
    }
    const int first = dims > 1 ? 1 : 0;  // the outermost dimension is the images, if not the only
    grid.images = first ? merged_sizes[0] : 1;
    grid.spatial_dims = std::max(dims - first, 1);
    grid.cells = 1;
    grid.sizes[0] = 1;
    for (int i = first; i < dims; ++i) {
      grid.sizes[i - first] = merged_sizes[i];
      grid.cells *= merged_sizes[i];
    }
    for (int v = 0; v < num_views_; ++v) {
      if (first) views_[v]->image_stride = merged_strides[v][0];
      for (int i = first; i < dims; ++i) views_[v]->cell_strides[i - first] = merged_strides[v][i];
    }
  }

 private:
  static constexpr int kMaxViews = 6;
  struct Strides {
    const int64_t* data;
    int left_out;  // 1: there is no dimension of maps
  };

  void add_view(TensorView& view, const Tensor& tensor, const char* name, int left_out) {
    STD_TORCH_CHECK(on_same_device(tensor, pred_), name, " must be on the device of pred");
    view.data = const_cast<void*>(tensor.const_data_ptr());
    view.dtype = dtype_of(tensor, name);
    views_[num_views_] = &view;
    strides_[num_views_++] = {tensor.strides().data(), left_out};
  }

  int64_t stride(int view, size_t dim) const {
    const Strides& strides = strides_[view];
    return strides.data[dim > 0 ? dim - strides.left_out : dim];
  }

  bool continues(const int64_t (&merged)[kMaxViews][kMaxSpatialDims + 1], int outer,
                 size_t inner) const {
    for (int v = 0; v < num_views_; ++v) {
      if (merged[v][outer] != stride(v, inner) * sizes_[inner]) return false;
    }
    return true;
  }

  const Tensor& pred_;
  torch::headeronly::IntHeaderOnlyArrayRef sizes_;
  int num_views_ = 0;
  TensorView* views_[kMaxViews];
  Strides strides_[kMaxViews];
};

// `numbers`: the weight of negative cells, that of positive ones, the ignored confidence (NaN:
// none) and the weights of the pose maps. A tensor takes the place of a number; one on the CPU is
// read now, so a captured CUDA graph keeps its value.
inline void describe_rule(LossPass& pass, const Tensor& pred, const OptionalTensor& negative_weight,
                          const OptionalTensor& coord_weight, const std::vector<double>& numbers,
                          std::optional<double> ignore_value) {
  const int64_t num_pose_maps = pass.grid.maps - 1;
  const auto count = static_cast<int64_t>(numbers.size()) - 2;
  STD_TORCH_CHECK(
      coord_weight || ((count == 1 || count == num_pose_maps) && count <= kInlineCoordWeights),
      "numbers must hold 2 numbers and 1 or C - 1 weights of pose maps, at most ",
      kInlineCoordWeights);
  STD_TORCH_CHECK(count >= 0, "numbers must hold 2 numbers and more");
  pass.negative_weight.number = numbers[0];
  pass.positive_weight = numbers[1];
  if (ignore_value) pass.ignore_value = rounded_to(pass.kinds.dtype, *ignore_value);
  if (negative_weight) {
    const Tensor& tensor = *negative_weight;
    STD_TORCH_CHECK(tensor.dim() == 0 && (tensor.is_cpu() || on_same_device(tensor, pred)),
                    "negative_weight must be a 0-dim tensor on the device of pred or on the CPU");
    Weight weight{tensor.const_data_ptr(), dtype_of(tensor, "negative_weight"), 0.0};
    if (tensor.is_cpu()) weight = {nullptr, DType::float64, weight.value()};
    pass.negative_weight = weight;
  }
  CoordWeights& coord = pass.coord_weights;
  if (coord_weight) {
    const Tensor& tensor = *coord_weight;
    coord.count = tensor.dim() == 0 ? 1 : num_pose_maps;
    STD_TORCH_CHECK(tensor.dim() == 0 || (tensor.dim() == 1 && tensor.size(0) == coord.count),
                    "coord_weight must be a tensor of shape () or (C - 1,)");
    coord.data = tensor.const_data_ptr();
    coord.dtype = dtype_of(tensor, "coord_weight");
    coord.stride = tensor.dim() == 0 ? 0 : tensor.stride(0);
    if (tensor.is_cpu() && coord.count <= kInlineCoordWeights) {
      for (int64_t map = 0; map < coord.count; ++map) {
        coord.numbers[map] = load_as<double>(coord.data, coord.dtype, map * coord.stride);
      }
      coord.data = nullptr;
    }
    STD_TORCH_CHECK(!coord.data || on_same_device(tensor, pred),
                    "coord_weight must be on the device of pred, or hold at most ",
                    kInlineCoordWeights, " numbers on the CPU");
  } else {
    coord.count = count;
    std::copy(numbers.begin() + 2, numbers.end(), coord.numbers);
  }
}

// The memory of an output of one number, in the dtype of the sums; nullptr if it is not wanted.
inline void* scalar_output(const OptionalTensor& tensor, const Tensor& pred, ScalarType dtype) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(
      tensor->numel() == 1 && tensor->scalar_type() == dtype && on_same_device(*tensor, pred),
      "an output of one number must be 0-dim, in the dtype of the sums, on the device of pred");
  return tensor->mutable_data_ptr();
}

// The operator, for a device with `run(pass, device index, workspace)`.
template <typename Device>
void loss_pass(const Tensor& pred, const Tensor& target, const OptionalTensor& negative_weight,
               const OptionalTensor& coord_weight, const std::vector<double>& numbers,
               std::optional<double> ignore_value, int64_t divisor, int64_t output,
               const OptionalTensor& grad_output, const OptionalTensor& known_positive,
               bool wrt_target, bool grad_is_for_one, const OptionalTensor& loss,
               const OptionalTensor& coord, const OptionalTensor& positive_conf,
               const OptionalTensor& negative_conf, const OptionalTensor& num_positive,
               const OptionalTensor& grad, const OptionalTensor& workspace) {
  STD_TORCH_CHECK(pred.dim() >= 2 && pred.size(1) >= 1,
                  "pred must have the shape (B, C, *S) with C >= 1");
  STD_TORCH_CHECK(output >= 0 && output <= static_cast<int64_t>(Output::element),
                  "output must be 0, 1 or 2");
  LossPass pass;
  pass.output = static_cast<Output>(output);
  pass.divisor = static_cast<double>(divisor);
  pass.wrt_target = wrt_target;
  pass.grad_is_for_one = grad_is_for_one;

  GridBuilder builder(pred);
  builder.add(pass.pred, pred, "pred");
  builder.add(pass.target, target, "target");
  builder.add_last_map(pass.kinds, pass.target);
  const bool wide = is_double(pass.pred.dtype, pass.target.dtype);
  const ScalarType sum_dtype = wide ? ScalarType::Double : ScalarType::Float;
  const auto add_result = [&](TensorView& view, const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == sum_dtype, name, " must have the dtype of the loss");
    pass.output == Output::cell ? builder.add_per_cell(view, tensor, name)
                                : builder.add(view, tensor, name);
  };
  if (pass.output == Output::scalar) {
    pass.loss = scalar_output(loss, pred, sum_dtype);
  } else if (loss) {
    add_result(pass.errors, *loss, "loss");
  }
  pass.coord = scalar_output(coord, pred, sum_dtype);
  pass.positive_conf = scalar_output(positive_conf, pred, sum_dtype);
  pass.negative_conf = scalar_output(negative_conf, pred, sum_dtype);
  pass.num_positive = static_cast<int64_t*>(scalar_output(num_positive, pred, ScalarType::Long));
  if (grad) {
    builder.add(pass.grad, *grad, "grad");
    STD_TORCH_CHECK(grad->scalar_type() == pred.scalar_type(), "grad must have the dtype of pred");
  }
  if (grad_output) {
    if (pass.output == Output::scalar) {
      STD_TORCH_CHECK(grad_output->numel() == 1 && on_same_device(*grad_output, pred),
                      "grad_output must be 0-dim, on the device of pred");
      pass.grad_output.data = const_cast<void*>(grad_output->const_data_ptr());
      pass.grad_output.dtype = dtype_of(*grad_output, "grad_output");
    } else {
      add_result(pass.grad_output, *grad_output, "grad_output");
    }
  }
  pass.known_positive =
      static_cast<const int64_t*>(scalar_output(known_positive, pred, ScalarType::Long));
  builder.build(pass.grid);
  describe_rule(pass, pred, negative_weight, coord_weight, numbers, ignore_value);
  Device::run(pass, pred, workspace);
}

}  // namespace fcrn
