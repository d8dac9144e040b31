// The CUDA kernels and the choice between them. Pure CUDA, no PyTorch: they are compiled for the
// host too, where tests/cuda_on_host runs them without a GPU.
//
// Three kernels do a pass, and each writes the gradient and takes the sums in the same launch:
//
//   planar       a thread takes 16 bytes of cells; where the pose of none of them counts it reads
//   the
//                two confidences and writes the gradient, 36 bytes a cell in float32; compiled a
//                second time (kGiven) for weights and kinds of the caller's, and for none
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

// Where the blocks of a launch meet: memory of its own, whose ticket is 0 before the launch.
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
#pragma unroll 1  // all of them at once take more registers than the rest of a kernel
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
    is_last = atomicAdd(workspace.ticket, 1u) == gridDim.x - 1;
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

template <typename T>
__device__ __forceinline__ T* at(const TensorView& view, uint32_t image, uint32_t map,
                                 uint32_t cell) {
  return static_cast<T*>(view.data) + (image * static_cast<uint32_t>(view.image_stride) +
                                       map * static_cast<uint32_t>(view.map_stride) + cell);
}

// ---- planar: V cells of one image ---------------------------------------------------------------

// What the caller says of V cells that lie side by side, from one map of `view`; `repeat` of them
// share an element.
template <typename T, typename Acc, int V>
__device__ __forceinline__ void load_given_as(const TensorView& view, uint32_t repeat,
                                              uint32_t image, uint32_t map, uint32_t cell,
                                              Acc (&to)[V]) {
  const T* from = at<const T>(view, image, map, 0);
  const auto stride = static_cast<uint32_t>(view.cell_strides[0]);
  const bool all_one = stride == 0 || repeat % V == 0;
  to[0] = Convert<Acc>::from(from[cell / repeat * stride]);
#pragma unroll
  for (int i = 1; i < V; ++i) {
    to[i] = all_one ? to[0] : Convert<Acc>::from(from[(cell + i) / repeat * stride]);
  }
}

template <typename Acc, int V>
__device__ __forceinline__ void load_given(const TensorView& view, uint32_t repeat, uint32_t image,
                                           uint32_t map, uint32_t cell, Acc (&to)[V]) {
  switch (view.dtype) {
    case DType::float64:
      return load_given_as<double>(view, repeat, image, map, cell, to);
    case DType::float32:
      return load_given_as<float>(view, repeat, image, map, cell, to);
    case DType::float16:
      return load_given_as<Half>(view, repeat, image, map, cell, to);
    case DType::bfloat16:
      return load_given_as<BFloat16>(view, repeat, image, map, cell, to);
    case DType::boolean:
      return load_given_as<Bool>(view, repeat, image, map, cell, to);
  }
}

template <typename Acc, typename Pred, typename Target, bool kForward, bool kGiven>
__device__ __forceinline__ void planar_cells(const LossPass& pass,
                                             const PassConstants<Acc>& constants, uint32_t image,
                                             uint32_t cell, Sums& sums) {
  constexpr int V = kVector<Pred, Target>;
  const bool has_kinds = !kGiven || pass.has_kinds;
  const bool has_weight = kGiven && pass.weight;
  const bool weight_is_per_cell = has_weight && pass.weight.map_stride == 0;
  const uint32_t pose_maps =
      static_cast<uint32_t>(kGiven ? pass.num_pose_maps() : pass.grid.maps - 1);
  const bool per_cell = !kForward && pass.has_grad_output_per_cell();
  const bool element_errors = kForward && pass.errors && pass.output == Output::element;
  Acc pred[V], target[V], error[V], grad[V], scale[V], given[V];
  Acc cell_error[V] = {};
  bool has_pose[V];
  bool any_pose = false;
  if (weight_is_per_cell) {
    load_given(pass.weight, static_cast<uint32_t>(pass.weight_repeat), image, 0, cell, given);
  }
  if (has_kinds) {
    load(at<const Pred>(pass.pred, image, pose_maps, cell), pred);
    load(at<const Target>(pass.target, image, pose_maps, cell), target);
    if (per_cell) load(at<const Acc>(pass.grad_output, image, pose_maps, cell), scale);
    if (has_weight && !weight_is_per_cell) {
      load_given(pass.weight, 1, image, pose_maps, cell, given);
    }
    const bool has_positive = kGiven && pass.positive;
    Acc given_positive[V];
    if (has_positive) load_given_as<Bool>(pass.positive, 1, image, 0, cell, given_positive);
    Acc positive_error = 0, negative_error = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const auto kind = has_positive ? kind_of(constants, target[i], given_positive[i] != Acc(0))
                                     : kind_of(constants, target[i]);
      auto weight = confidence_weight(constants, kind);
      bool counted = kind.counted;
      if (per_cell) weight.coefficient *= scale[i];
      if (has_weight) apply_weight(given[i], weight, counted);
      const auto result = element(counted, weight, pred[i] - target[i]);
      has_pose[i] = kind.positive && (!weight_is_per_cell || counted);
      any_pose |= has_pose[i];
      error[i] = cell_error[i] = result.error;
      grad[i] = result.gradient;
      positive_error += kind.positive ? error[i] : Acc(0);
      negative_error += kind.positive ? Acc(0) : error[i];
      if (kForward) sums.num_positive += kind.positive && counted;
    }
    if (kForward) {
      sums.negative_conf += negative_error;
      if (kGiven || any_pose) sums.positive_conf += positive_error;
    }
    if (pass.grad) store(at<Pred>(pass.grad, image, pose_maps, cell), grad);
    if (element_errors) store(at<Acc>(pass.errors, image, pose_maps, cell), error);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      has_pose[i] = !has_weight || given[i] != Acc(0);
      any_pose |= has_pose[i];
    }
  }

  const bool write_zeros = !pass.grad_is_for_one;
  for (uint32_t map = 0; map < pose_maps; ++map) {
#pragma unroll
    for (int i = 0; i < V; ++i) error[i] = grad[i] = 0;
    if (any_pose) {
      const auto of_map =
          ElementWeight<Acc>::of(pass.coord_weights.value(map), constants.dloss_derror);
      load(at<const Pred>(pass.pred, image, map, cell), pred);
      load(at<const Target>(pass.target, image, map, cell), target);
      if (per_cell) load(at<const Acc>(pass.grad_output, image, map, cell), scale);
      if (has_weight && !weight_is_per_cell) load_given(pass.weight, 1, image, map, cell, given);
      Acc map_error = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        auto weight = of_map;
        bool counted = has_pose[i];
        if (per_cell) weight.coefficient *= scale[i];
        if (has_weight) apply_weight(given[i], weight, counted);
        const auto result = element(counted, weight, pred[i] - target[i]);
        error[i] = result.error;
        grad[i] = result.gradient;
        cell_error[i] += error[i];
        map_error += error[i];
      }
      if (kForward) sums.coord += map_error;
    }
    if (pass.grad && (any_pose || write_zeros)) {
      store(at<Pred>(pass.grad, image, map, cell), grad);
    }
    if (element_errors) store(at<Acc>(pass.errors, image, map, cell), error);
  }
  if (kForward && pass.errors && pass.output == Output::cell) {
#pragma unroll
    for (int i = 0; i < V; ++i) cell_error[i] /= static_cast<Acc>(pass.divisor);
    store(at<Acc>(pass.errors, image, 0, cell), cell_error);
  }
}

// ---- interleaved: V elements that lie side by side ----------------------------------------------

template <typename Acc, typename Pred, typename Target, bool kForward>
__device__ __forceinline__ void interleaved_elements(const LossPass& pass,
                                                     const PassConstants<Acc>& constants,
                                                     uint32_t first, Sums& sums) {
  constexpr int V = kVector<Pred, Target>;
  const uint32_t maps = static_cast<uint32_t>(pass.grid.maps), last_map = maps - 1;
  const auto* kinds = static_cast<const Target*>(pass.kinds.data);
  const auto kind_of_cell = [&](uint32_t cell) {
    return kind_of(constants, Convert<Acc>::from(kinds[cell * maps]));
  };
  Acc pred[V], target[V], error[V], grad[V];
  load(static_cast<const Pred*>(pass.pred.data) + first, pred);
  load(static_cast<const Target*>(pass.target.data) + first, target);
  uint32_t cell = first / maps, map = first % maps;
  auto kind = kind_of_cell(cell);
  Acc coord_error = 0, positive_error = 0, negative_error = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const bool is_confidence = map == last_map;
    const bool counted = is_confidence ? kind.counted : kind.positive;
    error[i] = grad[i] = 0;
    if (counted) {
      const auto weight = is_confidence ? confidence_weight(constants, kind)
                                        : ElementWeight<Acc>::of(pass.coord_weights.value(map),
                                                                 constants.dloss_derror);
      const auto result = element(counted, weight, pred[i] - target[i]);
      error[i] = result.error;
      grad[i] = result.gradient;
    }
    if (kForward) {
      coord_error += is_confidence ? Acc(0) : error[i];
      positive_error += is_confidence && kind.positive ? error[i] : Acc(0);
      negative_error += is_confidence && !kind.positive ? error[i] : Acc(0);
      sums.num_positive += is_confidence && kind.positive;
    }
    if (++map == maps && i + 1 < V) {
      map = 0;
      kind = kind_of_cell(++cell);
    }
  }
  if (kForward) {
    sums.coord += coord_error;
    sums.positive_conf += positive_error;
    sums.negative_conf += negative_error;
  }
  if (pass.grad) store(static_cast<Pred*>(pass.grad.data) + first, grad);
  if (kForward && pass.errors) store(static_cast<Acc*>(pass.errors.data) + first, error);
}

// ---- strided: one cell --------------------------------------------------------------------------

template <typename Acc, typename Index, bool kForward>
__device__ __forceinline__ void strided_cell(const LossPass& pass,
                                             const PassConstants<Acc>& constants, Index image,
                                             Index cell, Sums& sums) {
  const Index maps = static_cast<Index>(pass.grid.maps);
  const Index pose_maps = static_cast<Index>(pass.num_pose_maps());
  const auto offset = [&](const TensorView& view) {
    return view ? view.cell_offset(pass.grid, image, cell) : Index(0);
  };
  const bool per_cell = !kForward && pass.has_grad_output_per_cell();
  const Index pred_cell = offset(pass.pred), target_cell = offset(pass.target);
  const Index grad_cell = offset(pass.grad), errors_cell = offset(pass.errors);
  const Index scale_cell = per_cell ? offset(pass.grad_output) : Index(0);
  const Index weight_cell = pass.weight ? pass.weight_offset(image, cell) : Index(0);
  const auto load_element = [&](const TensorView& view, Index cell_at, Index map) {
    return load_as<Acc>(view.data, view.dtype, cell_at + map * static_cast<Index>(view.map_stride));
  };
  const auto store_element = [&](const TensorView& view, Index cell_at, Index map, Acc value) {
    store_as(view.data, view.dtype, cell_at + map * static_cast<Index>(view.map_stride), value);
  };
  const bool element_errors = kForward && pass.errors && pass.output == Output::element;
  // Computes and writes the element of a map; its error. Whether it counts is for the weight to
  // say.
  const auto do_element = [&](Index map, bool& counted, ElementWeight<Acc> weight) {
    Element<Acc> result = {0, 0};
    if (counted && pass.weight) {
      apply_weight(load_element(pass.weight, weight_cell, map), weight, counted);
    }
    if (counted) {
      if (per_cell) weight.coefficient *= load_element(pass.grad_output, scale_cell, map);
      const Acc pred = load_element(pass.pred, pred_cell, map);
      result = element(true, weight, pred - load_element(pass.target, target_cell, map));
    }
    if (pass.grad && (counted || map == pose_maps || !pass.grad_is_for_one)) {
      store_element(pass.grad, grad_cell, map, result.gradient);
    }
    if (element_errors) store_element(pass.errors, errors_cell, map, result.error);
    return result.error;
  };

  Kind<bool> kind = {true, true};
  if (pass.has_kinds) {
    const Acc confidence = load_element(pass.kinds, offset(pass.kinds), 0);
    kind = pass.positive ? kind_of(constants, confidence,
                                   load_element(pass.positive, offset(pass.positive), 0) != Acc(0))
                         : kind_of(constants, confidence);
  }
  Acc pose_error = 0, error = 0;
  for (Index map = 0; map < pose_maps; ++map) {
    bool counted = kind.positive;
    pose_error +=
        do_element(map, counted,
                   ElementWeight<Acc>::of(pass.coord_weights.value(map), constants.dloss_derror));
  }
  bool counted = kind.counted;
  if (pose_maps < maps) error = do_element(pose_maps, counted, confidence_weight(constants, kind));
  if (kForward) {
    sums.coord += pose_error;
    (kind.positive ? sums.positive_conf : sums.negative_conf) += error;
    sums.num_positive += kind.positive && counted;
  }
  if (kForward && pass.errors && pass.output == Output::cell) {
    store_element(pass.errors, errors_cell, 0,
                  (pose_error + error) / static_cast<Acc>(pass.divisor));
  }
}

// ---- the kernels --------------------------------------------------------------------------------

// Each takes a 1-d grid of kThreads threads; its index must hold every offset in every tensor. A
// forward pass takes the sums, a backward pass (kForward false) writes a gradient only.

template <typename Acc, typename Pred, typename Target, bool kForward, bool kGiven>
__global__ void __launch_bounds__(kThreads, kGiven ? 2 : kResidentBlocks)
    planar_kernel(const __grid_constant__ LossPass pass, const Workspace workspace) {
  if (pass.has_nothing_to_do()) return;
  const PassConstants<Acc> constants = pass.constants<Acc>();
  constexpr int V = kVector<Pred, Target>;
  const uint32_t vectors_per_image = static_cast<uint32_t>(pass.grid.cells / V);
  const uint32_t vectors = static_cast<uint32_t>(pass.grid.images) * vectors_per_image;
  Sums sums;
  for (uint32_t vector = uint32_t(blockIdx.x) * kThreads + threadIdx.x; vector < vectors;
       vector += uint32_t(gridDim.x) * kThreads) {
    const uint32_t image = vector / vectors_per_image;
    const uint32_t cell = (vector - image * vectors_per_image) * V;
    planar_cells<Acc, Pred, Target, kForward, kGiven>(pass, constants, image, cell, sums);
  }
  if (kForward && pass.wants_sums()) finish<Acc>(pass, workspace, sums);
}

template <typename Acc, typename Pred, typename Target, bool kForward>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    interleaved_kernel(const __grid_constant__ LossPass pass, const Workspace workspace) {
  if (pass.has_nothing_to_do()) return;
  const PassConstants<Acc> constants = pass.constants<Acc>();
  constexpr int V = kVector<Pred, Target>;
  const uint32_t elements = static_cast<uint32_t>(pass.grid.cells * pass.grid.maps);
  Sums sums;
  for (uint32_t first = (uint32_t(blockIdx.x) * kThreads + threadIdx.x) * V; first < elements;
       first += uint32_t(gridDim.x) * kThreads * V) {
    interleaved_elements<Acc, Pred, Target, kForward>(pass, constants, first, sums);
  }
  if (kForward && pass.wants_sums()) finish<Acc>(pass, workspace, sums);
}

template <typename Acc, typename Index, bool kForward>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    strided_kernel(const __grid_constant__ LossPass pass, const Workspace workspace) {
  if (pass.has_nothing_to_do()) return;
  const PassConstants<Acc> constants = pass.constants<Acc>();
  const Index cells_per_image = static_cast<Index>(pass.grid.cells);
  const Index cells = static_cast<Index>(pass.grid.images) * cells_per_image;
  Sums sums;
  for (Index at = Index(blockIdx.x) * kThreads + threadIdx.x; at < cells;
       at += Index(gridDim.x) * kThreads) {
    const Index image = at / cells_per_image;
    strided_cell<Acc, Index, kForward>(pass, constants, image, at - image * cells_per_image, sums);
  }
  if (kForward && pass.wants_sums()) finish<Acc>(pass, workspace, sums);
}

// ---- the choice ---------------------------------------------------------------------------------

inline bool fits_32_bits(const LossPass& pass) {
  const Grid& grid = pass.grid;
  const auto fits = [&](const TensorView& view) {
    // room for one more stride of the largest grid, so that no counter wraps
    int64_t last = (grid.images - 1) * view.image_stride + (grid.maps - 1) * view.map_stride;
    for (int i = 0; i < grid.spatial_dims; ++i) last += (grid.sizes[i] - 1) * view.cell_strides[i];
    return last < (int64_t{1} << 31) - 1;
  };
  return pass.all_views(fits) && fits(pass.weight) && fits(pass.positive) &&
         grid.images * grid.cells * grid.maps < (int64_t{1} << 31) - 1;
}

// Whether V cells (planar) or elements (interleaved) can be moved in 16-byte units everywhere.
inline bool is_vector_planar(const LossPass& pass, int v) {
  return pass.grid.cells % v == 0 && pass.all_views([&](const TensorView& view) {
    const int64_t size = size_of(view.dtype);
    return view.is_planar(pass.grid) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
           view.image_stride * size % 16 == 0 && view.map_stride * size % 16 == 0;
  });
}

inline bool is_vector_interleaved(const LossPass& pass, int v) {
  return pass.is_plain() && !pass.has_grad_output_per_cell() && pass.output != Output::cell &&
         pass.grid.cells * pass.grid.maps % v == 0 && pass.all_views([&](const TensorView& view) {
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
    const unsigned blocks = num_blocks(cells / V, num_multiprocessors);
    if (pass.is_plain()) {
      launch(planar_kernel<Acc, Pred, Target, kForward, false>, blocks);
    } else {
      launch(planar_kernel<Acc, Pred, Target, kForward, true>, blocks);
    }
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
  if (pass.is_forward()) {
    run_kernel<true>(pass, wide_index, num_multiprocessors, launch);
  } else {
    run_kernel<false>(pass, wide_index, num_multiprocessors, launch);
  }
}

}  // namespace fcrn::cuda
