// The CUDA kernels and the choice between them. Pure CUDA, no PyTorch: they are compiled for the
// host too, where tests/cuda_on_host runs them without a GPU.
//
// Three kernels do a pass, and each writes the gradient and takes the sums in the same launch:
//
//   planar       a thread takes 16 bytes of cells; where none of them is positive it reads the two
//                confidences and writes the gradient, 36 bytes a cell in float32
//   interleaved  channels-last: a thread takes 16 bytes of elements, 84 bytes a cell in float32
//   strided      whatever is left (odd planes, misaligned pointers, float64, mixed layouts): a
//                thread takes a cell, element by element
//
// Threads walk the tensors with the stride of the grid, so that few blocks carry sums. A block's
// sums are added in a fixed order; the block that is last to finish, by a ticket, adds the blocks'.
#pragma once

#include "../loss_pass.h"

namespace fcrn::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kBlocksPerMultiprocessor = 8;
// At least so many blocks of a multiprocessor at once: leaves 80 registers a thread. Left to
// itself, ptxas aims at more and spills.
constexpr int kResidentBlocks = 3;

// Where the blocks of a launch meet. `ticket` is 0 before the launch and is left 0; no other launch
// may use it at the same time.
struct Workspace {
  Sums* block_sums = nullptr;  // [blocks]
  unsigned* ticket = nullptr;
};

// ---- memory -------------------------------------------------------------------------------------

// 16 bytes of the narrower type: so many cells or elements a thread takes at once.
template <typename Pred, typename Target>
constexpr int kVector = 16 / (sizeof(Pred) < sizeof(Target) ? sizeof(Pred) : sizeof(Target));

// V elements from a 16-byte boundary.
template <typename Acc, typename T, int V>
__device__ __forceinline__ void load(const T* from, Acc (&to)[V]) {
  T elements[V];
#pragma unroll
  for (int i = 0; i < V; i += 16 / sizeof(T)) {
    const uint4 unit = __ldg(reinterpret_cast<const uint4*>(from + i));
    memcpy(elements + i, &unit, sizeof(unit));
  }
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = Convert<Acc>::from(elements[i]);
}

template <typename T, typename Acc, int V>
__device__ __forceinline__ void store(T* to, const Acc (&from)[V]) {
  T elements[V];
#pragma unroll
  for (int i = 0; i < V; ++i) elements[i] = Convert<T>::from(from[i]);
#pragma unroll
  for (int i = 0; i < V; i += 16 / sizeof(T)) {
    uint4 unit;
    memcpy(&unit, elements + i, sizeof(unit));
    __stwb(reinterpret_cast<uint4*>(to + i), unit);  // a plain store may be taken apart
  }
}

// ---- sums ---------------------------------------------------------------------------------------

// The sums of all threads of a block, in thread 0; the order of the additions is fixed.
__device__ inline Sums sum_over_block(Sums sums) {
  __shared__ Sums warp_sums[kThreads / kWarp];
  constexpr unsigned kAll = 0xffffffffu;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sums.coord += __shfl_down_sync(kAll, sums.coord, offset);
    sums.positive_conf += __shfl_down_sync(kAll, sums.positive_conf, offset);
    sums.negative_conf += __shfl_down_sync(kAll, sums.negative_conf, offset);
    sums.num_positive += __shfl_down_sync(kAll, sums.num_positive, offset);
  }
  __syncthreads();  // of a sum before this one, no thread reads warp_sums any more
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / kWarp; ++warp) sums.add(warp_sums[warp]);
  }
  return sums;
}

// Adds the threads' sums up and, in the block that finishes last, the blocks' in their order.
template <typename Acc>
__device__ void finish(const LossPass& pass, const Workspace& workspace, const Sums& thread_sums) {
  __shared__ bool is_last;
  const Sums block = sum_over_block(thread_sums);
  if (threadIdx.x == 0) {
    workspace.block_sums[blockIdx.x] = block;
    // The sums must be in memory before the ticket says so: whoever draws the last ticket has seen
    // all earlier ones drawn, and with this fence what was written before them.
    __threadfence();
    // Wraps to 0 at the last block, which leaves the ticket ready for the next launch.
    is_last = atomicInc(workspace.ticket, gridDim.x - 1) == gridDim.x - 1;
    // The reader's side of the same: nothing below is read before the ticket was drawn.
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  Sums all;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
    const Sums* from = workspace.block_sums + i;
    // from the second-level cache: the first may hold what was there before
    all.add({__ldcg(&from->coord), __ldcg(&from->positive_conf), __ldcg(&from->negative_conf),
             __ldcg(reinterpret_cast<const long long*>(&from->num_positive))});
  }
  all = sum_over_block(all);
  if (threadIdx.x == 0) pass.write_results<Acc>(all);
}

// ---- what all threads of a pass know ------------------------------------------------------------

// Read once a thread, from the device where a tensor gives it: no value comes from the host.
template <typename Acc>
struct Known {
  CellRule<Acc> rule;
  double dloss_derror;
  Acc negative_coefficient, positive_coefficient;
  bool nothing_to_do;

  __device__ explicit Known(const LossPass& pass) : rule(pass.rule<Acc>()) {
    double grad_output = 1.0;
    if (pass.grad_output && !pass.has_grad_output_per_cell()) {
      grad_output = load_as<double>(pass.grad_output.data, pass.grad_output.dtype, 0);
    }
    dloss_derror = pass.dloss_derror(grad_output);
    negative_coefficient = coefficient(pass.negative_weight.value());
    positive_coefficient = coefficient(pass.positive_weight);
    nothing_to_do = pass.grad_is_for_one && dloss_derror == pass.dloss_derror_in_forward();
  }

  __device__ Acc coefficient(double weight) const {
    return static_cast<Acc>(gradient_coefficient(weight, dloss_derror));
  }
  __device__ Acc confidence_coefficient(bool positive) const {
    return positive ? positive_coefficient : negative_coefficient;
  }
  __device__ Acc confidence_weight(bool positive) const {
    return positive ? rule.positive_weight : rule.negative_weight;
  }
};

template <typename T>
__device__ __forceinline__ T* at(const TensorView& view, uint32_t image, uint32_t map,
                                 uint32_t cell) {
  return static_cast<T*>(view.data) + (image * static_cast<uint32_t>(view.image_stride) +
                                       map * static_cast<uint32_t>(view.map_stride) + cell);
}

// ---- planar: V cells of one image ---------------------------------------------------------------

template <typename Acc, typename Pred, typename Target, bool kForward>
__device__ __forceinline__ void planar_cells(const LossPass& pass, const Known<Acc>& known,
                                             uint32_t image, uint32_t cell, Sums& sums) {
  constexpr int V = kVector<Pred, Target>;
  const uint32_t last_map = static_cast<uint32_t>(pass.grid.maps - 1);
  const bool per_cell = !kForward && pass.has_grad_output_per_cell();
  Acc pred[V], target[V], error[V], slope[V], cell_error[V];
  bool positive[V];
  load(at<const Pred>(pass.pred, image, last_map, cell), pred);
  load(at<const Target>(pass.target, image, last_map, cell), target);
  Acc scale[V];
  if (per_cell) load(at<const Acc>(pass.grad_output, image, last_map, cell), scale);
  bool any_positive = false;
  Acc positive_error = 0, negative_error = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const Acc confidence = pass.kinds_from_pred ? pred[i] : target[i];
    const bool counted = is_counted(known.rule, confidence);
    positive[i] = is_positive(known.rule, confidence);
    any_positive |= positive[i];
    const Acc d = difference<Acc>(pred[i], target[i]);
    const Acc e = weighted_error(known.confidence_weight(positive[i]), d);
    Acc coefficient = known.confidence_coefficient(positive[i]);
    if (per_cell) coefficient *= scale[i];
    error[i] = counted ? e : Acc(0);
    slope[i] = counted ? gradient(coefficient, d) : Acc(0);
    cell_error[i] = error[i];
    positive_error += positive[i] ? error[i] : Acc(0);
    negative_error += positive[i] ? Acc(0) : error[i];
    if (kForward) sums.num_positive += positive[i];
  }
  if (kForward) {
    sums.negative_conf += negative_error;
    if (any_positive) sums.positive_conf += positive_error;
  }
  const bool element_errors = kForward && pass.errors && pass.reduction == Reduction::none;
  if (pass.grad) store(at<Pred>(pass.grad, image, last_map, cell), slope);
  if (element_errors) store(at<Acc>(pass.errors, image, last_map, cell), error);

  const bool write_zeros = !pass.grad_is_for_one;
  for (uint32_t map = 0; map < last_map; ++map) {
#pragma unroll
    for (int i = 0; i < V; ++i) error[i] = slope[i] = 0;
    if (any_positive) {
      const double weight = pass.coord_weights.value(map);
      const Acc w = static_cast<Acc>(weight), coefficient = known.coefficient(weight);
      load(at<const Pred>(pass.pred, image, map, cell), pred);
      load(at<const Target>(pass.target, image, map, cell), target);
      if (per_cell) load(at<const Acc>(pass.grad_output, image, map, cell), scale);
      Acc map_error = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Acc d = difference<Acc>(pred[i], target[i]);
        if (positive[i]) error[i] = weighted_error(w, d);
        if (positive[i]) slope[i] = gradient(per_cell ? coefficient * scale[i] : coefficient, d);
        cell_error[i] += error[i];
        map_error += error[i];
      }
      if (kForward) sums.coord += map_error;
    }
    if (pass.grad && (any_positive || write_zeros)) {
      store(at<Pred>(pass.grad, image, map, cell), slope);
    }
    if (element_errors) store(at<Acc>(pass.errors, image, map, cell), error);
  }
  if (kForward && pass.errors && pass.reduction == Reduction::cell) {
#pragma unroll
    for (int i = 0; i < V; ++i) cell_error[i] /= static_cast<Acc>(pass.grid.maps);
    store(at<Acc>(pass.errors, image, 0, cell), cell_error);
  }
}

// ---- interleaved: V elements that lie side by side ----------------------------------------------

template <typename Acc, typename Pred, typename Target, bool kForward>
__device__ __forceinline__ void interleaved_elements(const LossPass& pass, const Known<Acc>& known,
                                                     uint32_t first, Sums& sums) {
  constexpr int V = kVector<Pred, Target>;
  const uint32_t maps = static_cast<uint32_t>(pass.grid.maps), last_map = maps - 1;
  const Pred* preds = static_cast<const Pred*>(pass.pred.data);
  const Target* targets = static_cast<const Target*>(pass.target.data);
  const auto confidence_of = [&](uint32_t cell) {
    const uint32_t element = cell * maps + last_map;
    return pass.kinds_from_pred ? Convert<Acc>::from(preds[element])
                                : Convert<Acc>::from(targets[element]);
  };
  Acc pred[V], target[V], error[V], slope[V];
  load(preds + first, pred);
  load(targets + first, target);
  uint32_t cell = first / maps, map = first % maps;
  Acc confidence = confidence_of(cell);
  Acc coord_error = 0, positive_error = 0, negative_error = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const bool is_confidence = map == last_map, positive = is_positive(known.rule, confidence);
    const bool counted = is_confidence ? is_counted(known.rule, confidence) : positive;
    error[i] = slope[i] = 0;
    if (counted) {
      const double coord_weight = is_confidence ? 0.0 : pass.coord_weights.value(map);
      const Acc d = difference<Acc>(pred[i], target[i]);
      error[i] = weighted_error(
          is_confidence ? known.confidence_weight(positive) : static_cast<Acc>(coord_weight), d);
      slope[i] = gradient(
          is_confidence ? known.confidence_coefficient(positive) : known.coefficient(coord_weight),
          d);
    }
    if (kForward) {
      coord_error += is_confidence ? Acc(0) : error[i];
      positive_error += is_confidence && positive ? error[i] : Acc(0);
      negative_error += is_confidence && !positive ? error[i] : Acc(0);
      sums.num_positive += is_confidence && positive;
    }
    if (++map == maps && i + 1 < V) {
      map = 0;
      confidence = confidence_of(++cell);
    }
  }
  if (kForward) {
    sums.coord += coord_error;
    sums.positive_conf += positive_error;
    sums.negative_conf += negative_error;
  }
  if (pass.grad) store(static_cast<Pred*>(pass.grad.data) + first, slope);
  if (kForward && pass.errors) store(static_cast<Acc*>(pass.errors.data) + first, error);
}

// ---- strided: one cell --------------------------------------------------------------------------

template <typename Acc, typename Index, bool kForward>
__device__ __forceinline__ void strided_cell(const LossPass& pass, const Known<Acc>& known,
                                             Index image, Index cell, Sums& sums) {
  const Index last_map = static_cast<Index>(pass.grid.maps - 1);
  const auto offset = [&](const TensorView& view) {
    return view ? view.cell_offset(pass.grid, image, cell) : Index(0);
  };
  const Index pred_cell = offset(pass.pred), target_cell = offset(pass.target);
  const Index grad_cell = offset(pass.grad), errors_cell = offset(pass.errors);
  const bool per_cell = !kForward && pass.has_grad_output_per_cell();
  const Index scale_cell = per_cell ? offset(pass.grad_output) : Index(0);
  const auto load_element = [&](const TensorView& view, Index cell_at, Index map) {
    return load_as<Acc>(view.data, view.dtype, cell_at + map * static_cast<Index>(view.map_stride));
  };
  const auto store_element = [&](const TensorView& view, Index cell_at, Index map, Acc value) {
    store_as(view.data, view.dtype, cell_at + map * static_cast<Index>(view.map_stride), value);
  };
  const auto scaled = [&](Acc coefficient, Index map) {
    return per_cell ? coefficient * load_element(pass.grad_output, scale_cell, map) : coefficient;
  };
  const bool element_errors = kForward && pass.errors && pass.reduction == Reduction::none;

  const Acc conf_pred = load_element(pass.pred, pred_cell, last_map);
  const Acc conf_target = load_element(pass.target, target_cell, last_map);
  const Acc confidence = pass.kinds_from_pred ? conf_pred : conf_target;
  const bool positive = is_positive(known.rule, confidence);
  Acc cell_error = 0;
  for (Index map = 0; map < last_map; ++map) {
    Acc error = 0, slope = 0;
    if (positive) {
      const double weight = pass.coord_weights.value(map);
      const Acc d = difference<Acc>(load_element(pass.pred, pred_cell, map),
                                    load_element(pass.target, target_cell, map));
      error = weighted_error(static_cast<Acc>(weight), d);
      slope = gradient(scaled(known.coefficient(weight), map), d);
      cell_error += error;
    }
    if (pass.grad && (positive || !pass.grad_is_for_one)) {
      store_element(pass.grad, grad_cell, map, slope);
    }
    if (element_errors) store_element(pass.errors, errors_cell, map, error);
  }
  Acc error = 0, slope = 0;
  if (is_counted(known.rule, confidence)) {
    const Acc d = difference<Acc>(conf_pred, conf_target);
    error = weighted_error(known.confidence_weight(positive), d);
    slope = gradient(scaled(known.confidence_coefficient(positive), last_map), d);
  }
  if (kForward) {
    sums.coord += cell_error;
    (positive ? sums.positive_conf : sums.negative_conf) += error;
    sums.num_positive += positive;
  }
  if (pass.grad) store_element(pass.grad, grad_cell, last_map, slope);
  if (element_errors) store_element(pass.errors, errors_cell, last_map, error);
  if (kForward && pass.errors && pass.reduction == Reduction::cell) {
    store_element(pass.errors, errors_cell, 0, (cell_error + error) / pass.grid.maps);
  }
}

// ---- the kernels --------------------------------------------------------------------------------

// Each takes a 1-d grid of kThreads threads; its index must hold every offset in every tensor. A
// forward pass takes the sums, a backward pass (kForward false) writes a gradient only.

template <typename Acc, typename Pred, typename Target, bool kForward>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    planar_kernel(const __grid_constant__ LossPass pass, const Workspace workspace) {
  const Known<Acc> known(pass);
  if (known.nothing_to_do) return;
  constexpr int V = kVector<Pred, Target>;
  const uint32_t vectors_per_image = static_cast<uint32_t>(pass.grid.cells / V);
  const uint32_t vectors = static_cast<uint32_t>(pass.grid.images) * vectors_per_image;
  Sums sums;
  for (uint32_t vector = uint32_t(blockIdx.x) * kThreads + threadIdx.x; vector < vectors;
       vector += uint32_t(gridDim.x) * kThreads) {
    const uint32_t image = vector / vectors_per_image;
    const uint32_t cell = (vector - image * vectors_per_image) * V;
    planar_cells<Acc, Pred, Target, kForward>(pass, known, image, cell, sums);
  }
  if (kForward) finish<Acc>(pass, workspace, sums);
}

template <typename Acc, typename Pred, typename Target, bool kForward>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    interleaved_kernel(const __grid_constant__ LossPass pass, const Workspace workspace) {
  const Known<Acc> known(pass);
  if (known.nothing_to_do) return;
  constexpr int V = kVector<Pred, Target>;
  const uint32_t elements = static_cast<uint32_t>(pass.grid.cells * pass.grid.maps);
  Sums sums;
  for (uint32_t first = (uint32_t(blockIdx.x) * kThreads + threadIdx.x) * V; first < elements;
       first += uint32_t(gridDim.x) * kThreads * V) {
    interleaved_elements<Acc, Pred, Target, kForward>(pass, known, first, sums);
  }
  if (kForward) finish<Acc>(pass, workspace, sums);
}

template <typename Acc, typename Index, bool kForward>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    strided_kernel(const __grid_constant__ LossPass pass, const Workspace workspace) {
  const Known<Acc> known(pass);
  if (known.nothing_to_do) return;
  const Index cells_per_image = static_cast<Index>(pass.grid.cells);
  const Index cells = static_cast<Index>(pass.grid.images) * cells_per_image;
  Sums sums;
  for (Index at = Index(blockIdx.x) * kThreads + threadIdx.x; at < cells;
       at += Index(gridDim.x) * kThreads) {
    const Index image = at / cells_per_image;
    strided_cell<Acc, Index, kForward>(pass, known, image, at - image * cells_per_image, sums);
  }
  if (kForward) finish<Acc>(pass, workspace, sums);
}

// ---- the choice ---------------------------------------------------------------------------------

// The tensors of a pass with their element sizes; grad_output only if it differs by cell.
template <typename Check>
bool all_views(const LossPass& pass, Check&& check) {
  for (const TensorView* view : {&pass.pred, &pass.target, &pass.grad, &pass.errors}) {
    if (*view && !check(*view)) return false;
  }
  return !pass.grad_output || !pass.has_grad_output_per_cell() || check(pass.grad_output);
}

inline bool fits_32_bits(const LossPass& pass) {
  const Grid& grid = pass.grid;
  return all_views(pass,
                   [&](const TensorView& view) {
                     // room for one more stride of the largest grid, so that no counter wraps
                     int64_t last =
                         (grid.images - 1) * view.image_stride + (grid.maps - 1) * view.map_stride;
                     for (int i = 0; i < grid.spatial_dims; ++i)
                       last += (grid.sizes[i] - 1) * view.cell_strides[i];
                     return last < (int64_t{1} << 31) - 1;
                   }) &&
         grid.images * grid.cells * grid.maps < (int64_t{1} << 31) - 1;
}

// Whether V cells (planar) or elements (interleaved) can be moved in 16-byte units everywhere.
inline bool is_vector_planar(const LossPass& pass, int v) {
  return pass.grid.cells % v == 0 && all_views(pass, [&](const TensorView& view) {
           const int64_t size = size_of(view.dtype);
           return view.is_planar(pass.grid) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
                  view.image_stride * size % 16 == 0 && view.map_stride * size % 16 == 0;
         });
}

inline bool is_vector_interleaved(const LossPass& pass, int v) {
  return !(pass.grad_output && pass.has_grad_output_per_cell()) &&
         pass.reduction != Reduction::cell && pass.grid.cells * pass.grid.maps % v == 0 &&
         all_views(pass, [&](const TensorView& view) {
           return view.is_interleaved(pass.grid) &&
                  reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
         });
}

inline unsigned num_blocks(int64_t work_items, int num_multiprocessors) {
  const int64_t wanted = (work_items + kThreads - 1) / kThreads;
  const int64_t most = int64_t{num_multiprocessors} * kBlocksPerMultiprocessor;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

template <typename Index, bool kForward, typename Launch>
void run_strided(const LossPass& pass, int num_multiprocessors, Launch&& launch) {
  const unsigned blocks = num_blocks(pass.grid.images * pass.grid.cells, num_multiprocessors);
  if (is_double(pass.pred.dtype, pass.target.dtype)) {
    launch(strided_kernel<double, Index, kForward>, blocks);
  } else {
    launch(strided_kernel<float, Index, kForward>, blocks);
  }
}

// Launches the vector kernel for a pair of dtypes; false where the layout does not allow it.
template <typename Acc, typename Pred, typename Target, bool kForward, typename Launch>
bool run_vector(const LossPass& pass, int num_multiprocessors, Launch&& launch) {
  if (pass.pred.dtype != DTypeOf<Pred>::value || pass.target.dtype != DTypeOf<Target>::value) {
    return false;
  }
  constexpr int V = kVector<Pred, Target>;
  const int64_t cells = pass.grid.images * pass.grid.cells;
  if (is_vector_planar(pass, V)) {
    launch(planar_kernel<Acc, Pred, Target, kForward>, num_blocks(cells / V, num_multiprocessors));
    return true;
  }
  if (is_vector_interleaved(pass, V)) {
    launch(interleaved_kernel<Acc, Pred, Target, kForward>,
           num_blocks(cells * pass.grid.maps / V, num_multiprocessors));
    return true;
  }
  return false;
}

// Vectors for the pairs of dtypes that training meets; the others, float64 among them, and tensors
// of 2^31 elements and more, which few have the memory for, go element by element.
template <bool kForward, typename Launch>
void run_kernel(const LossPass& pass, bool wide_index, int num_multiprocessors, Launch&& launch) {
  const auto run = [&]<typename Pred, typename Target>(Pred, Target) {
    return run_vector<float, Pred, Target, kForward>(pass, num_multiprocessors, launch);
  };
  if (wide_index) {
    run_strided<int64_t, kForward>(pass, num_multiprocessors, launch);
  } else if (!run(float{}, float{}) && !run(BFloat16{}, float{}) && !run(Half{}, float{}) &&
             !run(BFloat16{}, BFloat16{}) && !run(Half{}, Half{})) {
    run_strided<uint32_t, kForward>(pass, num_multiprocessors, launch);
  }
}

// Chooses the kernel for a pass and calls `launch(kernel, blocks)`, which is to launch it with
// kThreads threads a block, the pass and, for a forward pass, a Workspace of so many blocks.
template <typename Launch>
void run_pass(const LossPass& pass, int num_multiprocessors, Launch&& launch,
              bool wide_index = false) {
  wide_index = wide_index || !fits_32_bits(pass);
  if (pass.wants_sums || pass.errors) {
    run_kernel<true>(pass, wide_index, num_multiprocessors, launch);
  } else {
    run_kernel<false>(pass, wide_index, num_multiprocessors, launch);
  }
}

}  // namespace fcrn::cuda
