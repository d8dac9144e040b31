// What the operators do on every device: check what memory safety needs, allocate the results and
// describe the pass. A device adds `run(pass, pred)`. Included by ops.cpp and by
// cuda/fcrn_loss_cuda.cpp, which live in two libraries; speaks PyTorch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "loss_pass.h"

namespace fcrn {

using torch::stable::Tensor;

// Arguments that all operators have in common, in the order of their schemas (ops.cpp).
struct Rule {
  const std::optional<Tensor>& negative_weight_tensor;
  const std::optional<Tensor>& coord_weight_tensor;
  double negative_weight;
  double positive_weight;
  const std::vector<double>& coord_weight;
  std::optional<double> ignore_value;
  int64_t reduction;
};

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

inline int32_t device_type_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &code));
  return code;
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  static const int32_t float64 = aoti_torch_dtype_float64(), float32 = aoti_torch_dtype_float32(),
                       float16 = aoti_torch_dtype_float16(), bfloat16 = aoti_torch_dtype_bfloat16();
  const int32_t code = dtype_code(tensor);
  if (code == float32) return DType::float32;
  if (code == bfloat16) return DType::bfloat16;
  if (code == float16) return DType::float16;
  STD_TORCH_CHECK(code == float64, name, " must be float64, float32, float16 or bfloat16");
  return DType::float64;
}

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  return device_type_code(a) == device_type_code(b) && a.get_device_index() == b.get_device_index();
}

inline bool on_cpu(const Tensor& tensor) {
  return device_type_code(tensor) == aoti_torch_device_type_cpu();
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

// ---- allocation ---------------------------------------------------------------------------------

inline Tensor empty_strided(const Tensor& like, int64_t dim, const int64_t* sizes,
                            const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, dtype, device_type_code(like), like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_scalar(const Tensor& like, int32_t dtype) {
  return empty_strided(like, 0, nullptr, nullptr, dtype);
}

// The strides that torch.empty_like gives a tensor: its own where it fills its memory.
inline std::vector<int64_t> strides_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<size_t> order;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t dense = 1;
  for (const size_t i : order) {
    if (strides[i] != dense) {
      const Tensor like = torch::stable::empty_like(tensor);  // owns what strides() shows
      const auto own = like.strides();
      return {own.begin(), own.end()};
    }
    dense *= sizes[i];
  }
  return {strides.begin(), strides.end()};
}

inline Tensor empty_like(const Tensor& tensor, int32_t dtype) {
  const auto sizes = tensor.sizes();
  if (tensor.is_contiguous()) {
    return empty_strided(tensor, tensor.dim(), sizes.data(), tensor.strides().data(), dtype);
  }
  return empty_strided(tensor, tensor.dim(), sizes.data(), strides_like(tensor).data(), dtype);
}

// (B, *S), contiguous.
inline Tensor empty_per_cell(const Tensor& pred, int32_t dtype) {
  std::vector<int64_t> sizes(pred.sizes().begin(), pred.sizes().end());
  sizes.erase(sizes.begin() + 1);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return empty_strided(pred, pred.dim() - 1, sizes.data(), strides.data(), dtype);
}

// ---- description of the pass --------------------------------------------------------------------

// Lays the tensors of a pass over one grid: takes (B, C, *S) apart into images, maps and cells, and
// merges dimensions that lie in memory as one in all of the tensors.
class GridBuilder {
 public:
  explicit GridBuilder(const Tensor& pred) : sizes_(pred.sizes()) {}

  // `strides` over (B, C, *S); for a tensor (B, *S), `per_cell`, the same without C.
  void add(TensorView& view, const Tensor& tensor, DType dtype, const void* data,
           bool per_cell = false) {
    view.data = const_cast<void*>(data);
    view.dtype = dtype;
    const auto strides = tensor.strides();
    view.map_stride = per_cell ? 0 : strides[1];
    views_[num_views_] = &view;
    strides_[num_views_++] = {strides.data(), per_cell};
  }

  // One value for all elements.
  static void add_scalar(TensorView& view, DType dtype, const void* data) {
    view.data = const_cast<void*>(data);
    view.dtype = dtype;
  }

  void build(Grid& grid) const {
    grid.batch = sizes_[0];
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
  static constexpr int kMaxViews = 5;
  struct Strides {
    const int64_t* data;
    bool per_cell;
  };

  int64_t stride(int view, size_t dim) const {
    const Strides& strides = strides_[view];
    return strides.data[dim > 0 && strides.per_cell ? dim - 1 : dim];
  }

  bool continues(const int64_t (&merged)[kMaxViews][kMaxSpatialDims + 1], int outer,
                 size_t inner) const {
    for (int v = 0; v < num_views_; ++v) {
      if (merged[v][outer] != stride(v, inner) * sizes_[inner]) return false;
    }
    return true;
  }

  torch::headeronly::IntHeaderOnlyArrayRef sizes_;
  int num_views_ = 0;
  TensorView* views_[kMaxViews];
  Strides strides_[kMaxViews];
};

inline void check_pair(const Tensor& pred, const Tensor& target) {
  const auto sizes = pred.sizes(), other = target.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2 && sizes[1] >= 1,
                  "pred must have the shape (B, C, *S) with C >= 1");
  STD_TORCH_CHECK(
      sizes.size() == other.size() && std::equal(sizes.begin(), sizes.end(), other.begin()),
      "target must have the shape of pred");
  STD_TORCH_CHECK(on_same_device(pred, target), "target must be on the device of pred");
}

inline void check_weight(const char* name, double weight) {
  STD_TORCH_CHECK(weight >= 0.0 && std::isfinite(weight), name,
                  " must be finite and not negative, got ", weight);
}

// A weight tensor on the CPU is read now and becomes a number: a captured CUDA graph keeps it.
inline void describe_rule(LossPass& pass, const Rule& rule, const Tensor& pred, DType kinds_dtype) {
  STD_TORCH_CHECK(rule.reduction >= 0 && rule.reduction <= static_cast<int64_t>(Reduction::none),
                  "reduction must be 0 to 5");
  pass.reduction = static_cast<Reduction>(rule.reduction);
  check_weight("positive_weight", rule.positive_weight);
  pass.positive_weight = rule.positive_weight;
  STD_TORCH_CHECK(!rule.ignore_value || !std::isnan(*rule.ignore_value),
                  "ignore_value must not be NaN");
  if (rule.ignore_value) pass.ignore_value = rounded_to(kinds_dtype, *rule.ignore_value);

  check_weight("negative_weight", rule.negative_weight);
  pass.negative_weight.number = rule.negative_weight;
  if (rule.negative_weight_tensor) {
    const Tensor& tensor = *rule.negative_weight_tensor;
    STD_TORCH_CHECK(tensor.dim() == 0 && (on_cpu(tensor) || on_same_device(tensor, pred)),
                    "negative_weight must be a 0-dim tensor on the device of pred or on the CPU");
    Weight weight{tensor.const_data_ptr(), dtype_of(tensor, "negative_weight"), 0.0};
    if (on_cpu(tensor)) weight = {nullptr, DType::float64, weight.value()};
    pass.negative_weight = weight;
  }

  CoordWeights& coord = pass.coord_weights;
  const int64_t num_pose_maps = pred.size(1) - 1;
  if (rule.coord_weight_tensor) {
    const Tensor& tensor = *rule.coord_weight_tensor;
    STD_TORCH_CHECK(
        (tensor.dim() == 0 || (tensor.dim() == 1 && tensor.size(0) == num_pose_maps)) &&
            (on_cpu(tensor) || on_same_device(tensor, pred)),
        "coord_weight must be a tensor of shape () or (C - 1,) on the device of pred or "
        "on the CPU");
    coord.data = tensor.const_data_ptr();
    coord.data_on_host = on_cpu(tensor);
    coord.dtype = dtype_of(tensor, "coord_weight");
    coord.count = tensor.dim() == 0 ? 1 : num_pose_maps;
    coord.stride = tensor.dim() == 0 ? 0 : tensor.stride(0);
    if (on_cpu(tensor) && coord.count <= kInlineCoordWeights) {
      for (int64_t map = 0; map < coord.count; ++map) {
        coord.numbers[map] = load_as<double>(coord.data, coord.dtype, map * coord.stride);
      }
      coord.data = nullptr;
    }
  } else {
    const auto count = static_cast<int64_t>(rule.coord_weight.size());
    STD_TORCH_CHECK(count == 1 || count == num_pose_maps,
                    "coord_weight must hold one number or C - 1, got ", count);
    for (const double weight : rule.coord_weight) check_weight("coord_weight", weight);
    coord.count = count;
    if (count <= kInlineCoordWeights) {
      std::copy(rule.coord_weight.begin(), rule.coord_weight.end(), coord.numbers);
    } else {
      coord.data = rule.coord_weight.data();
      coord.data_on_host = true;
      coord.dtype = DType::float64;
      coord.stride = 1;
    }
  }
}

// ---- the operators ------------------------------------------------------------------------------

// loss[, coord, positive_conf, negative_conf, num_positive][, grad], all by one pass.
template <typename Device>
std::vector<Tensor> forward(const Tensor& pred, const Tensor& target, const Rule& rule,
                            bool want_grad, bool want_stats) {
  check_pair(pred, target);
  LossPass pass;
  const DType pred_dtype = dtype_of(pred, "pred"), target_dtype = dtype_of(target, "target");
  describe_rule(pass, rule, pred, target_dtype);
  const bool wide = is_double(pred_dtype, target_dtype);
  const int32_t sum_code = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const DType sum_dtype = wide ? DType::float64 : DType::float32;

  GridBuilder builder(pred);
  builder.add(pass.pred, pred, pred_dtype, pred.const_data_ptr());
  builder.add(pass.target, target, target_dtype, target.const_data_ptr());

  std::vector<Tensor> results;
  results.reserve(6);
  if (pass.has_grad_output_per_cell()) {
    const bool per_cell = pass.reduction == Reduction::cell;
    results.push_back(per_cell ? empty_per_cell(pred, sum_code) : empty_like(pred, sum_code));
    builder.add(pass.errors, results[0], sum_dtype, results[0].data_ptr(), per_cell);
  } else {
    results.push_back(empty_scalar(pred, sum_code));
    pass.loss = results[0].data_ptr();
  }
  if (want_stats) {
    for (void** part : {&pass.coord, &pass.positive_conf, &pass.negative_conf}) {
      results.push_back(empty_scalar(pred, sum_code));
      *part = results.back().data_ptr();
    }
    results.push_back(empty_scalar(pred, aoti_torch_dtype_int64()));
    pass.num_positive = static_cast<int64_t*>(results.back().data_ptr());
  }
  pass.wants_sums = want_stats || pass.loss;
  if (want_grad) {
    results.push_back(empty_like(pred, dtype_code(pred)));
    builder.add(pass.grad, results.back(), pred_dtype, results.back().data_ptr());
  }
  builder.build(pass.grid);
  Device::run(pass, pred);
  return results;
}

// What the two backward operators have in common: all but the gradient itself.
inline void describe_backward(LossPass& pass, GridBuilder& builder, const Tensor& grad_output,
                              const Tensor& pred, const Tensor& target, const Rule& rule,
                              const std::optional<Tensor>& num_positive, bool wrt_target) {
  const Tensor& first = wrt_target ? target : pred;
  const Tensor& second = wrt_target ? pred : target;
  const DType first_dtype = dtype_of(first, "pred"), second_dtype = dtype_of(second, "target");
  pass.kinds_from_pred = wrt_target;
  describe_rule(pass, rule, pred, wrt_target ? first_dtype : second_dtype);

  builder.add(pass.pred, first, first_dtype, first.const_data_ptr());
  builder.add(pass.target, second, second_dtype, second.const_data_ptr());

  STD_TORCH_CHECK(on_same_device(grad_output, pred), "grad_output must be on the device of pred");
  const DType grad_output_dtype = dtype_of(grad_output, "grad_output");
  if (pass.has_grad_output_per_cell()) {
    const bool per_cell = pass.reduction == Reduction::cell;
    const auto sizes = grad_output.sizes(), wanted = pred.sizes();
    bool fits = sizes.size() + per_cell == wanted.size();
    for (size_t i = 0, j = 0; fits && j < wanted.size(); ++j) {
      if (per_cell && j == 1) continue;
      fits = sizes[i++] == wanted[j];
    }
    STD_TORCH_CHECK(fits, "grad_output must have the shape of the loss");
    STD_TORCH_CHECK((grad_output_dtype == DType::float64) == is_double(first_dtype, second_dtype) &&
                        size_of(grad_output_dtype) >= 4,
                    "grad_output must have the dtype of the loss");
    builder.add(pass.grad_output, grad_output, grad_output_dtype, grad_output.const_data_ptr(),
                per_cell);
  } else {
    STD_TORCH_CHECK(grad_output.numel() == 1, "grad_output must have the shape of the loss");
    GridBuilder::add_scalar(pass.grad_output, grad_output_dtype, grad_output.const_data_ptr());
  }
  if (pass.reduction == Reduction::positive) {
    STD_TORCH_CHECK(num_positive && num_positive->numel() == 1 &&
                        dtype_code(*num_positive) == aoti_torch_dtype_int64() &&
                        on_same_device(*num_positive, pred),
                    "num_positive must be a 0-dim int64 tensor on the device of pred");
    pass.known_positive = static_cast<const int64_t*>(num_positive->const_data_ptr());
  }
}

// dloss/dpred or dloss/dtarget for a grad_output, computed afresh.
template <typename Device>
Tensor backward(const Tensor& grad_output, const Tensor& pred, const Tensor& target,
                const Rule& rule, const std::optional<Tensor>& num_positive, bool wrt_target) {
  check_pair(pred, target);
  LossPass pass;
  GridBuilder builder(pred);
  describe_backward(pass, builder, grad_output, pred, target, rule, num_positive, wrt_target);
  const Tensor& differentiated = wrt_target ? target : pred;
  Tensor grad = empty_like(differentiated, dtype_code(differentiated));
  builder.add(pass.grad, grad, pass.pred.dtype, grad.data_ptr());
  builder.build(pass.grid);
  Device::run(pass, pred);
  return grad;
}

// Turns the gradient that `forward` wrote into the one for `grad_output`, in place.
template <typename Device>
void rescale_(const Tensor& grad, const Tensor& grad_output, const Tensor& pred,
              const Tensor& target, const Rule& rule, const std::optional<Tensor>& num_positive) {
  check_pair(pred, target);
  check_pair(pred, grad);
  LossPass pass;
  GridBuilder builder(pred);
  describe_backward(pass, builder, grad_output, pred, target, rule, num_positive, false);
  STD_TORCH_CHECK(!pass.has_grad_output_per_cell(),
                  "rescale_ serves reductions with one result only");
  STD_TORCH_CHECK(dtype_code(grad) == dtype_code(pred), "grad must have the dtype of pred");
  builder.add(pass.grad, grad, pass.pred.dtype, grad.mutable_data_ptr());
  pass.grad_is_for_one = true;
  builder.build(pass.grid);
  Device::run(pass, pred);
}

// ---- boxing: the operators as the dispatcher calls them, for one device -------------------------

template <typename Device>
std::vector<Tensor> forward_op(const Tensor& pred, const Tensor& target,
                               const std::optional<Tensor>& negative_weight_tensor,
                               const std::optional<Tensor>& coord_weight_tensor,
                               double negative_weight, double positive_weight,
                               const std::vector<double>& coord_weight,
                               std::optional<double> ignore_value, int64_t reduction,
                               bool want_grad, bool want_stats) {
  return forward<Device>(pred, target,
                         {negative_weight_tensor, coord_weight_tensor, negative_weight,
                          positive_weight, coord_weight, ignore_value, reduction},
                         want_grad, want_stats);
}

template <typename Device>
Tensor backward_op(const Tensor& grad_output, const Tensor& pred, const Tensor& target,
                   const std::optional<Tensor>& negative_weight_tensor,
                   const std::optional<Tensor>& coord_weight_tensor, double negative_weight,
                   double positive_weight, const std::vector<double>& coord_weight,
                   std::optional<double> ignore_value, int64_t reduction,
                   const std::optional<Tensor>& num_positive, bool wrt_target) {
  return backward<Device>(grad_output, pred, target,
                          {negative_weight_tensor, coord_weight_tensor, negative_weight,
                           positive_weight, coord_weight, ignore_value, reduction},
                          num_positive, wrt_target);
}

template <typename Device>
void rescale_op(const Tensor& grad, const Tensor& grad_output, const Tensor& pred,
                const Tensor& target, const std::optional<Tensor>& negative_weight_tensor,
                const std::optional<Tensor>& coord_weight_tensor, double negative_weight,
                double positive_weight, const std::vector<double>& coord_weight,
                std::optional<double> ignore_value, int64_t reduction,
                const std::optional<Tensor>& num_positive) {
  rescale_<Device>(grad, grad_output, pred, target,
                   {negative_weight_tensor, coord_weight_tensor, negative_weight, positive_weight,
                    coord_weight, ignore_value, reduction},
                   num_positive);
}

template <typename Device>
void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("forward", TORCH_BOX(&forward_op<Device>));
  library.impl("backward", TORCH_BOX(&backward_op<Device>));
  library.impl("rescale_", TORCH_BOX(&rescale_op<Device>));
}

}  // namespace fcrn
