// The operators for any device: they check what memory safety requires and fill a LossPass.
// Included by ops.cpp and cuda/, which are two libraries. Uses only PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "loss_pass.h"

// Both operators make one pass and write into given tensors: `loss`, whose shape depends on
// `output`, parts (3,), num_positive () and `grad`, of pred's shape. With kinds, the tensors are
// (B, C, *S); without (`numbers` is empty), they have any one shape. `weight` is expanded to that
// shape, `positive` to (B, *S).
#define FCRN_RULE_SCHEMA                                                        \
  "Tensor pred, Tensor target, Tensor? negative_weight, Tensor? coord_weight, " \
  "Tensor? weight, Tensor? positive, Tensor? weight_sum, float[] numbers, "     \
  "float? ignore_value, int divisor, int output, "
#define FCRN_FORWARD_INTO_SCHEMA                                   \
  "forward_into(" FCRN_RULE_SCHEMA                                 \
  "Tensor(a!) loss, Tensor(b!)? parts, Tensor(c!)? num_positive, " \
  "Tensor(d!)? grad, Tensor(e!)? workspace) -> ()"
#define FCRN_BACKWARD_INTO_SCHEMA                       \
  "backward_into(Tensor grad_output, " FCRN_RULE_SCHEMA \
  "Tensor? num_positive, bool wrt_target, bool grad_is_for_one, Tensor(a!) grad) -> ()"

// The weight_sum of a mean: that of a contiguous tensor of weights, each of which `repeats`
// elements have, in a 0-dim float64 tensor.
#define FCRN_SUM_INTO_SCHEMA \
  "sum_into(Tensor weight, int repeats, Tensor(a!) sum, Tensor(b!)? workspace) -> ()"

namespace fcrn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments that both operators have.
struct RuleArguments {
  const Tensor &pred, &target;
  const OptionalTensor &negative_weight, &coord_weight, &weight, &positive, &weight_sum;
  const std::vector<double>& numbers;
  std::optional<double> ignore_value;
  int64_t divisor, output;
};

enum class Elements { floating, floating_or_bool };

inline DType dtype_of(const Tensor& tensor, const char* name,
                      Elements elements = Elements::floating) {
  switch (tensor.scalar_type()) {
    case ScalarType::Bool:
      if (elements == Elements::floating_or_bool) return DType::boolean;
      break;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16");
}

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline double rounded_to(DType dtype, double value) {
  return visit_floating(dtype, [value](auto element) {
    return Convert<double>::from(Convert<decltype(element)>::from(value));
  });
}

// Fits one grid to the tensors of a pass: splits (B, C, *S) into images, maps and cells, and merges
// dimensions that are contiguous in all tensors. Without kinds, the dimensions are ordered by
// pred's strides, and the maps are a dimension in which the weight is broadcast, so that it is read
// once for all maps. If the weight is broadcast in the innermost dimension, that dimension is
// merged too, and neighbouring cells share a weight.
class GridBuilder {
 public:
  GridBuilder(const Tensor& pred, bool has_kinds)
      : pred_(pred), sizes_(pred.sizes()), has_kinds_(has_kinds) {}

  // A tensor of pred's shape.
  void add(TensorView& view, const Tensor& tensor, const char* name,
           Elements elements = Elements::floating) {
    const auto sizes = tensor.sizes();
    STD_TORCH_CHECK(
        sizes.size() == sizes_.size() && std::equal(sizes.begin(), sizes.end(), sizes_.begin()),
        name, " must have the shape of pred");
    if (has_kinds_) view.map_stride = tensor.strides()[1];
    add_view(view, tensor, name, 0, elements);
  }

  // A tensor (B, *S).
  void add_per_cell(TensorView& view, const Tensor& tensor, const char* name,
                    Elements elements = Elements::floating) {
    const auto sizes = tensor.sizes();
    STD_TORCH_CHECK(has_kinds_ && sizes.size() + 1 == sizes_.size() && sizes[0] == sizes_[0] &&
                        std::equal(sizes.begin() + 1, sizes.end(), sizes_.begin() + 2),
                    name, " must have the shape of pred without its maps");
    add_view(view, tensor, name, 1, elements);
  }

  // The last map of a tensor that was added.
  void add_last_map(TensorView& view, const TensorView& of) {
    view.dtype = of.dtype;
    const int64_t offset = (sizes_[1] - 1) * of.map_stride * size_of(of.dtype);
    if (of.data) view.data = static_cast<char*>(of.data) + offset;  // null if empty
    for (int v = 0; v < num_views_; ++v) {
      if (views_[v] == &of) strides_[num_views_] = strides_[v];
    }
    views_[num_views_++] = &view;
  }

  void build(LossPass& pass) const {
    Grid& grid = pass.grid;
    std::vector<Dim> dims = merged();
    grid.maps = has_kinds_ ? sizes_[1] : 1;
    if (!has_kinds_ && pass.weight) {
      pass.weight_repeat = merge_repeated(dims, index_of(pass.weight));
      grid.maps = take_maps(dims, index_of(pass.weight));
    }
    const size_t first = dims.size() > 1 ? 1 : 0;  // after the images
    STD_TORCH_CHECK(dims.size() <= first + kMaxSpatialDims, "pred and target may have at most ",
                    kMaxSpatialDims + 1,
                    " dimensions that cannot be merged with a neighbour; call contiguous()");
    grid.images = first ? dims[0].size : 1;
    grid.spatial_dims = std::max(static_cast<int>(dims.size() - first), 1);
    grid.cells = 1;
    grid.sizes[0] = 1;
    for (size_t i = first; i < dims.size(); ++i) {
      grid.sizes[i - first] = dims[i].size;
      grid.cells *= dims[i].size;
    }
    for (int v = 0; v < num_views_; ++v) {
      if (first) views_[v]->image_stride = dims[0].strides[v];
      for (size_t i = first; i < dims.size(); ++i) {
        views_[v]->cell_strides[i - first] = dims[i].strides[v];
      }
    }
  }

 private:
  static constexpr int kMaxViews = 8;
  struct Strides {
    const int64_t* data;
    int left_out;  // 1 if the tensor has no dimension of maps
  };
  struct Dim {
    int64_t size;
    std::array<int64_t, kMaxViews> strides;
  };

  void add_view(TensorView& view, const Tensor& tensor, const char* name, int left_out,
                Elements elements) {
    STD_TORCH_CHECK(on_same_device(tensor, pred_), name, " must be on the device of pred");
    view.data = const_cast<void*>(tensor.const_data_ptr());
    view.dtype = dtype_of(tensor, name, elements);
    views_[num_views_] = &view;
    strides_[num_views_++] = {tensor.strides().data(), left_out};
  }

  // The dimensions except that of the maps, outermost first.
  std::vector<Dim> merged() const {
    std::vector<size_t> order;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      if (sizes_[i] != 1 && !(has_kinds_ && i == 1)) order.push_back(i);
    }
    if (!has_kinds_) {
      const int64_t* strides = strides_[0].data;  // pred's
      std::stable_sort(order.begin(), order.end(),
                       [strides](size_t a, size_t b) { return strides[a] > strides[b]; });
    }
    std::vector<Dim> dims;
    for (const size_t i : order) {
      Dim dim{sizes_[i], {}};
      for (int v = 0; v < num_views_; ++v) {
        dim.strides[v] = strides_[v].data[i > 0 ? i - strides_[v].left_out : i];
      }
      if (!dims.empty() && continues(dims.back(), dim)) {
        dim.size *= dims.back().size;
        dims.back() = dim;
      } else {
        dims.push_back(dim);
      }
    }
    return dims;
  }

  // Whether two dimensions are contiguous in all views, `except` one.
  bool continues(const Dim& outer, const Dim& inner, int except = -1) const {
    for (int v = 0; v < num_views_; ++v) {
      if (v != except && outer.strides[v] != inner.strides[v] * inner.size) return false;
    }
    return true;
  }

  int index_of(const TensorView& view) const {
    int v = 0;
    while (views_[v] != &view) ++v;
    return v;
  }

  // If the weight is broadcast in the innermost dimension, merges that with the next one where all
  // other tensors are contiguous. Returns how many neighbours share a weight.
  int64_t merge_repeated(std::vector<Dim>& dims, int weight) const {
    if (dims.size() < 2) return 1;
    Dim inner = dims.back();
    const Dim& outer = dims[dims.size() - 2];
    if (inner.strides[weight] != 0 || !continues(outer, inner, weight)) return 1;
    const int64_t repeat = inner.size;
    inner.size *= outer.size;
    inner.strides[weight] = outer.strides[weight];
    dims.pop_back();
    dims.back() = inner;
    return repeat;
  }

  // Removes the innermost dimension in which the weight is broadcast, except the last one, whose
  // elements are vectorised, and makes it that of the maps. Returns the number of maps.
  int64_t take_maps(std::vector<Dim>& dims, int weight) const {
    for (size_t i = dims.empty() ? 0 : dims.size() - 1; i-- > 0;) {
      if (dims[i].strides[weight] != 0) continue;
      const int64_t maps = dims[i].size;
      for (int v = 0; v < num_views_; ++v) views_[v]->map_stride = dims[i].strides[v];
      dims.erase(dims.begin() + static_cast<ptrdiff_t>(i));
      return maps;
    }
    return 1;
  }

  const Tensor& pred_;
  torch::headeronly::IntHeaderOnlyArrayRef sizes_;
  const bool has_kinds_;
  int num_views_ = 0;
  TensorView* views_[kMaxViews];
  Strides strides_[kMaxViews];
};

inline Number number_in(const Tensor& tensor, const Tensor& pred, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 0 && on_same_device(tensor, pred), name,
                  " must be a 0-dim tensor on the device of pred");
  return {tensor.const_data_ptr(), dtype_of(tensor, name), 0.0};
}

// `numbers` holds negative_weight, positive_weight and the weights of the pose maps; the tensors
// negative_weight and coord_weight replace them.
inline void fill_rule(LossPass& pass, const RuleArguments& given) {
  if (!pass.has_kinds) return;  // every weight is 1
  const int64_t num_pose_maps = pass.grid.maps - 1;
  const auto count = static_cast<int64_t>(given.numbers.size()) - 2;
  STD_TORCH_CHECK(count >= 0 && count <= kInlineCoordWeights &&
                      (count == 1 || count == num_pose_maps || given.coord_weight),
                  "numbers must hold 2 numbers and 1 or C - 1 weights of pose maps, at most ",
                  kInlineCoordWeights);
  pass.negative_weight.number = given.numbers[0];
  pass.positive_weight = given.numbers[1];
  if (given.ignore_value) pass.ignore_value = rounded_to(pass.kinds.dtype, *given.ignore_value);
  if (given.negative_weight) {
    pass.negative_weight = number_in(*given.negative_weight, given.pred, "negative_weight");
  }
  CoordWeights& coord = pass.coord_weights;
  coord.count = count;
  std::copy(given.numbers.begin() + 2, given.numbers.end(), coord.numbers);
  if (given.coord_weight) {
    const Tensor& tensor = *given.coord_weight;
    const int64_t dim = tensor.dim();
    STD_TORCH_CHECK((dim == 0 || (dim == 1 && tensor.size(0) == num_pose_maps)) &&
                        on_same_device(tensor, given.pred),
                    "coord_weight must be of shape () or (C - 1,), on the device of pred");
    coord.count = dim == 0 ? 1 : num_pose_maps;
    coord.data = tensor.const_data_ptr();
    coord.dtype = dtype_of(tensor, "coord_weight");
    coord.stride = dim == 0 ? 0 : tensor.stride(0);
  }
}

// The memory of a result of `count` numbers; nullptr if there is no tensor.
inline void* numbers_in(const OptionalTensor& tensor, int64_t count, const Tensor& pred,
                        ScalarType dtype, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->numel() == count && tensor->is_contiguous() &&
                      tensor->scalar_type() == dtype && on_same_device(*tensor, pred),
                  name, " must be contiguous, on the device of pred, and hold ", count,
                  " numbers: int64 for num_positive, float64 for weight_sum, else the dtype of ",
                  "the loss");
  return tensor->mutable_data_ptr();
}

// The place where sum_into writes.
inline double* sum_of_weights(const Tensor& weight, const Tensor& sum) {
  STD_TORCH_CHECK(weight.is_contiguous(), "weight must be contiguous");
  return static_cast<double*>(numbers_in(sum, 1, weight, ScalarType::Double, "sum"));
}

// Checks and fills what the passes of both operators have in common.
class PassBuilder {
 public:
  explicit PassBuilder(const RuleArguments& given)
      : given_(given), grid_(given.pred, !given.numbers.empty()) {
    pass.has_kinds = !given.numbers.empty();
    STD_TORCH_CHECK(!pass.has_kinds || (given.pred.dim() >= 2 && given.pred.size(1) >= 1),
                    "pred must have the shape (B, C, *S) with C >= 1");
    STD_TORCH_CHECK(given.output >= 0 && given.output <= static_cast<int64_t>(Output::element),
                    "output must be 0, 1 or 2");
    pass.output = static_cast<Output>(given.output);
    pass.divisor = static_cast<double>(given.divisor);
    pass.known_divisor = static_cast<const double*>(
        numbers_in(given.weight_sum, 1, given.pred, ScalarType::Double, "weight_sum"));
    grid_.add(pass.pred, given.pred, "pred");
    grid_.add(pass.target, given.target, "target");
    if (pass.has_kinds) grid_.add_last_map(pass.kinds, pass.target);
    if (given.weight) grid_.add(pass.weight, *given.weight, "weight", Elements::floating_or_bool);
    if (given.positive) {
      grid_.add_per_cell(pass.positive, *given.positive, "positive", Elements::floating_or_bool);
      STD_TORCH_CHECK(pass.positive.dtype == DType::boolean, "positive must be bool");
    }
    const bool wide = is_double(pass.pred.dtype, pass.target.dtype);
    sum_dtype = wide ? ScalarType::Double : ScalarType::Float;
  }

  // The loss or grad_output, with one value per cell or per element.
  void add_result(TensorView& view, const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == sum_dtype, name, " must have the dtype of the loss");
    pass.output == Output::cell ? grid_.add_per_cell(view, tensor, name)
                                : grid_.add(view, tensor, name);
  }

  void add_grad(const Tensor& grad) {
    grid_.add(pass.grad, grad, "grad");
    STD_TORCH_CHECK(grad.scalar_type() == given_.pred.scalar_type(),
                    "grad must have the dtype of pred");
  }

  const LossPass& build() {
    grid_.build(pass);
    fill_rule(pass, given_);
    return pass;
  }

  LossPass pass;
  ScalarType sum_dtype;

 private:
  const RuleArguments given_;
  GridBuilder grid_;
};

// The operators. `Device::run(pass, pred, workspace)` runs the pass.
template <typename Device>
void forward_into(const Tensor& pred, const Tensor& target, const OptionalTensor& negative_weight,
                  const OptionalTensor& coord_weight, const OptionalTensor& weight,
                  const OptionalTensor& positive, const OptionalTensor& weight_sum,
                  const std::vector<double>& numbers, std::optional<double> ignore_value,
                  int64_t divisor, int64_t output, const Tensor& loss, const OptionalTensor& parts,
                  const OptionalTensor& num_positive, const OptionalTensor& grad,
                  const OptionalTensor& workspace) {
  PassBuilder builder({pred, target, negative_weight, coord_weight, weight, positive, weight_sum,
                       numbers, ignore_value, divisor, output});
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
  Device::run(builder.build(), pred, workspace);
}

template <typename Device>
void backward_into(const Tensor& grad_output, const Tensor& pred, const Tensor& target,
                   const OptionalTensor& negative_weight, const OptionalTensor& coord_weight,
                   const OptionalTensor& weight, const OptionalTensor& positive,
                   const OptionalTensor& weight_sum, const std::vector<double>& numbers,
                   std::optional<double> ignore_value, int64_t divisor, int64_t output,
                   const OptionalTensor& num_positive, bool wrt_target, bool grad_is_for_one,
                   const Tensor& grad) {
  PassBuilder builder({pred, target, negative_weight, coord_weight, weight, positive, weight_sum,
                       numbers, ignore_value, divisor, output});
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
  Device::run(builder.build(), pred, std::nullopt);
}

}  // namespace fcrn
