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

// A pass over pred and target, (B, C, *S), that writes into what it is given: `loss` in the shape
// that `output` says, parts (3,), num_positive (), `grad` (B, C, *S).
#define FCRN_RULE_SCHEMA                                                        \
  "Tensor pred, Tensor target, Tensor? negative_weight, Tensor? coord_weight, " \
  "float[] numbers, float? ignore_value, int divisor, int output, "
#define FCRN_FORWARD_INTO_SCHEMA                                   \
  "forward_into(" FCRN_RULE_SCHEMA                                 \
  "Tensor(a!) loss, Tensor(b!)? parts, Tensor(c!)? num_positive, " \
  "Tensor(d!)? grad, Tensor(e!)? workspace) -> ()"
#define FCRN_BACKWARD_INTO_SCHEMA                       \
  "backward_into(Tensor grad_output, " FCRN_RULE_SCHEMA \
  "Tensor? num_positive, bool wrt_target, bool grad_is_for_one, Tensor(a!) grad) -> ()"

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

// `numbers`: the weight of negative cells, that of positive ones, and the weights of the pose maps.
// A tensor takes the place of a number.
inline void describe_rule(LossPass& pass, const Tensor& pred, const OptionalTensor& negative_weight,
                          const OptionalTensor& coord_weight, const std::vector<double>& numbers,
                          std::optional<double> ignore_value) {
  const int64_t num_pose_maps = pass.grid.maps - 1;
  const auto count = static_cast<int64_t>(numbers.size()) - 2;
  STD_TORCH_CHECK(count >= 0 && count <= kInlineCoordWeights &&
                      (count == 1 || count == num_pose_maps || coord_weight),
                  "numbers must hold 2 numbers and 1 or C - 1 weights of pose maps, at most ",
                  kInlineCoordWeights);
  pass.negative_weight.number = numbers[0];
  pass.positive_weight = numbers[1];
  if (ignore_value) pass.ignore_value = rounded_to(pass.kinds.dtype, *ignore_value);
  if (negative_weight) {
    STD_TORCH_CHECK(negative_weight->dim() == 0 && on_same_device(*negative_weight, pred),
                    "negative_weight must be a 0-dim tensor on the device of pred");
    pass.negative_weight = {negative_weight->const_data_ptr(),
                            dtype_of(*negative_weight, "negative_weight"), 0.0};
  }
  CoordWeights& coord = pass.coord_weights;
  coord.count = count;
  std::copy(numbers.begin() + 2, numbers.end(), coord.numbers);
  if (coord_weight) {
    const int64_t dim = coord_weight->dim();
    STD_TORCH_CHECK((dim == 0 || (dim == 1 && coord_weight->size(0) == num_pose_maps)) &&
                        on_same_device(*coord_weight, pred),
                    "coord_weight must be of shape () or (C - 1,), on the device of pred");
    coord.count = dim == 0 ? 1 : num_pose_maps;
    coord.data = coord_weight->const_data_ptr();
    coord.dtype = dtype_of(*coord_weight, "coord_weight");
    coord.stride = dim == 0 ? 0 : coord_weight->stride(0);
  }
}

// The memory of `count` numbers, in this dtype; nullptr if they are not wanted.
inline void* numbers_in(const OptionalTensor& tensor, int64_t count, const Tensor& pred,
                        ScalarType dtype, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->numel() == count && tensor->is_contiguous() &&
                      tensor->scalar_type() == dtype && on_same_device(*tensor, pred),
                  name, " must hold ", count,
                  " numbers, on the device of pred; parts and a loss in ",
                  "the dtype of the sums, num_positive in int64");
  return tensor->mutable_data_ptr();
}

// The part of a pass that both directions have.
class PassBuilder {
 public:
  PassBuilder(const Tensor& pred, const Tensor& target, int64_t divisor, int64_t output)
      : grid_(pred), pred_(pred) {
    STD_TORCH_CHECK(pred.dim() >= 2 && pred.size(1) >= 1,
                    "pred must have the shape (B, C, *S) with C >= 1");
    STD_TORCH_CHECK(output >= 0 && output <= static_cast<int64_t>(Output::element),
                    "output must be 0, 1 or 2");
    pass.output = static_cast<Output>(output);
    pass.divisor = static_cast<double>(divisor);
    grid_.add(pass.pred, pred, "pred");
    grid_.add(pass.target, target, "target");
    grid_.add_last_map(pass.kinds, pass.target);
    const bool wide = is_double(pass.pred.dtype, pass.target.dtype);
    sum_dtype = wide ? ScalarType::Double : ScalarType::Float;
  }

  // E, or what a caller makes of it, as `output` says; not for Output::scalar.
  void add_result(TensorView& view, const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == sum_dtype, name, " must have the dtype of the loss");
    pass.output == Output::cell ? grid_.add_per_cell(view, tensor, name)
                                : grid_.add(view, tensor, name);
  }

  void add_grad(const Tensor& grad) {
    grid_.add(pass.grad, grad, "grad");
    STD_TORCH_CHECK(grad.scalar_type() == pred_.scalar_type(), "grad must have the dtype of pred");
  }

  void build() { grid_.build(pass.grid); }

  LossPass pass;
  ScalarType sum_dtype;

 private:
  GridBuilder grid_;
  const Tensor& pred_;
};

// The operators, for a device with `run(pass, pred, workspace)`.
template <typename Device>
void forward_into(const Tensor& pred, const Tensor& target, const OptionalTensor& negative_weight,
                  const OptionalTensor& coord_weight, const std::vector<double>& numbers,
                  std::optional<double> ignore_value, int64_t divisor, int64_t output,
                  const Tensor& loss, const OptionalTensor& parts,
                  const OptionalTensor& num_positive, const OptionalTensor& grad,
                  const OptionalTensor& workspace) {
  PassBuilder builder(pred, target, divisor, output);
  LossPass& pass = builder.pass;
  if (pass.output == Output::scalar) {
    pass.loss = numbers_in(loss, 1, pred, builder.sum_dtype, "loss");
  } else {
    builder.add_result(pass.errors, loss, "loss");
  }
  if (auto* part = static_cast<char*>(numbers_in(parts, 3, pred, builder.sum_dtype, "parts"))) {
    const int64_t size = builder.sum_dtype == ScalarType::Double ? sizeof(double) : sizeof(float);
    pass.coord = part;
    pass.positive_conf = part + size;
    pass.negative_conf = part + 2 * size;
  }
  pass.num_positive =
      static_cast<int64_t*>(numbers_in(num_positive, 1, pred, ScalarType::Long, "num_positive"));
  if (grad) builder.add_grad(*grad);
  builder.build();
  describe_rule(pass, pred, negative_weight, coord_weight, numbers, ignore_value);
  Device::run(pass, pred, workspace);
}

template <typename Device>
void backward_into(const Tensor& grad_output, const Tensor& pred, const Tensor& target,
                   const OptionalTensor& negative_weight, const OptionalTensor& coord_weight,
                   const std::vector<double>& numbers, std::optional<double> ignore_value,
                   int64_t divisor, int64_t output, const OptionalTensor& num_positive,
                   bool wrt_target, bool grad_is_for_one, const Tensor& grad) {
  PassBuilder builder(pred, target, divisor, output);
  LossPass& pass = builder.pass;
  pass.wrt_target = wrt_target;
  pass.grad_is_for_one = grad_is_for_one;
  if (pass.output == Output::scalar) {
    STD_TORCH_CHECK(grad_output.numel() == 1 && on_same_device(grad_output, pred),
                    "grad_output must be 0-dim, on the device of pred");
    pass.grad_output.data = const_cast<void*>(grad_output.const_data_ptr());
    pass.grad_output.dtype = dtype_of(grad_output, "grad_output");
  } else {
    builder.add_result(pass.grad_output, grad_output, "grad_output");
  }
  pass.known_positive = static_cast<const int64_t*>(
      numbers_in(num_positive, 1, pred, ScalarType::Long, "num_positive"));
  builder.add_grad(grad);
  builder.build();
  describe_rule(pass, pred, negative_weight, coord_weight, numbers, ignore_value);
  Device::run(pass, pred, std::nullopt);
}

}  // namespace fcrn
