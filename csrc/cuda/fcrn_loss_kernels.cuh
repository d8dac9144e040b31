// The CUDA kernels and the choice between them. Pure CUDA, no PyTorch: they are compiled for the
// host too, where tests/cuda_on_host runs them without a GPU.
//
// Three kernels do a pass, and each writes the gradient and takes the sums in the same launch:
//
//   planar       a thread takes 16 bytes of cells; where none of their poses counts it reads the
//                two confidences and writes the gradient, 36 bytes a cell in float32; the threads
//                of a warp share out the poses that count, 48 bytes a cell more; compiled a second
//                time (kGeneral) for a weight or kinds of the caller's, for no kinds at all
//                and for losses that are no single number
//   interleaved  channels-last: a thread takes 16 bytes of elements, of one cell or two; 84 bytes
//                a cell in float32
//   strided      whatever is left (odd planes, misaligned pointers, float64, mixed layouts): a
//                thread takes a cell, element by element
//
// Threads walk the tensors with the stride of the grid, which is as large as can run at once. A
// block's sums are added in a fixed order; the block that is last to finish, by a ticket, adds the
// blocks'. docs/performance.md says why the kernels are as they are.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../loss_pass.h"

namespace fcrn::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// So many blocks of a multiprocessor run at once at least, which leaves a thread 64 registers.
constexpr int kResidentBlocks = 4;
constexpr int kMostResidentBlocks = 2048 / kThreads;  // on any GPU
// A thread asks for so many maps of V cells before it waits for the first.
template <int V>
constexpr int kMapsAtOnce = V == 4 ? 2 : 1;

// Where the blocks of a launch meet: memory of its own, whose ticket is 0 before the launch.
struct Workspace {
  Sums* block_sums = nullptr;  // [blocks]
  unsigned* ticket = nullptr;
};

// ---- memory -------------------------------------------------------------------------------------

// 16 bytes of the narrower type: so many cells or elements a thread takes at once.
template <typename Pred, typename Target>
constexpr int kVector = 16 / (sizeof(Pred) < sizeof(Target) ? sizeof(Pred) : sizeof(Target));

// kResidentBlocks of the planar kernels: the most at which they do not spill.
template <typename Pred, typename Target, bool kGeneral>
constexpr int planar_blocks() {
  constexpr bool kIsMixed = sizeof(Pred) != sizeof(Target);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // its code needs more registers
  return kGeneral ? 2 : kIsMixed ? 3 : kResidentBlocks;
#else
  return !kGeneral ? kResidentBlocks : kIsMixed ? 2 : 3;
#endif
}

// V elements that lie side by side, moved by the widest accesses that hold no more.
template <typename T, int V>
struct Vector {
  static constexpr int kBytes = V * sizeof(T);
  using Unit = std::conditional_t<kBytes % 16 == 0, uint4,
                                  std::conditional_t<kBytes % 8 == 0, uint2, unsigned>>;
  T values[V];

  static __device__ bool may_lie_at(const T* place) {
    return reinterpret_cast<uintptr_t>(place) % sizeof(Unit) == 0;
  }

  static __device__ __forceinline__ Vector load(const T* from) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kBytes; i += sizeof(Unit)) {
      const Unit unit =
          __ldg(reinterpret_cast<const Unit*>(reinterpret_cast<const char*>(from) + i));
      memcpy(reinterpret_cast<char*>(vector.values) + i, &unit, sizeof(unit));
    }
    return vector;
  }
};

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
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sums.coord += __shfl_down_sync(kAllLanes, sums.coord, offset);
    sums.positive_conf += __shfl_down_sync(kAllLanes, sums.positive_conf, offset);
    sums.negative_conf += __shfl_down_sync(kAllLanes, sums.negative_conf, offset);
    sums.num_positive += __shfl_down_sync(kAllLanes, sums.num_positive, offset);
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

// Adds the threads' sums up and, in the block that finishes last, the blocks' in their order; one
// thread of it calls `write` with the sum of all.
template <typename Write>
__device__ void finish(const Workspace& workspace, const Sums& thread_sums, Write&& write) {
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
  if (threadIdx.x == 0) write(all);
}

template <typename Acc>
__device__ void finish_pass(const LossPass& pass, const Workspace& workspace, const Sums& sums) {
  if (!pass.wants_sums()) return;
  finish(workspace, sums, [&](const Sums& all) { pass.write_results<Acc>(all); });
}

// ---- what is the same for all threads of a block ------------------------------------------------

// The weights of the pose maps that a block keeps; maps beyond that have the last of them, which is
// right where all have one.
constexpr uint32_t kPoseWeights = kThreads;

// The constants of a pass and its weights, by the kind of an element. They take arithmetic in
// double, of which many GPUs do two a clock, so a block computes them once.
template <typename Acc>
struct BlockConstants {
  enum Entry : uint32_t { kMasked, kNegative, kPositive, kPose };

  PassConstants<Acc> of_pass;
  ElementWeight<Acc> weights[kPose + kPoseWeights];
  Acc divisor;  // of a cell's errors
  bool nothing_to_do;

  __device__ ElementWeight<Acc> of_pose(uint32_t map) const {
    return weights[kPose + (map < kPoseWeights ? map : kPoseWeights - 1)];
  }

  __device__ void set_up(const LossPass& pass) {
    if (threadIdx.x == 0) {
      of_pass = pass.constants<Acc>();
      weights[kMasked] = {0, 0};
      weights[kNegative] = of_pass.negative;
      weights[kPositive] = of_pass.positive;
      divisor = static_cast<Acc>(pass.divisor);
      nothing_to_do = pass.has_nothing_to_do();
    }
    if (threadIdx.x < pass.num_pose_maps()) {
      weights[kPose + threadIdx.x] =
          ElementWeight<Acc>::of(pass.coord_weights.value(threadIdx.x), pass.dloss_derror());
    }
    __syncthreads();
  }
};

// ---- planar: V cells of one image ---------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T* at(const TensorView& view, uint32_t image, uint32_t map,
                                 uint32_t cell) {
  return static_cast<T*>(view.data) + (image * static_cast<uint32_t>(view.image_stride) +
                                       map * static_cast<uint32_t>(view.map_stride) + cell);
}

// What the caller says of V cells that lie side by side, from one map of `view`; `repeat` of them
// share an element.
template <typename T, typename Acc, int V>
__device__ __forceinline__ void load_given_as(const TensorView& view, uint32_t repeat,
                                              uint32_t image, uint32_t map, uint32_t cell,
                                              Acc (&to)[V]) {
  const T* from = at<const T>(view, image, map, 0);
  const auto stride = static_cast<uint32_t>(view.cell_strides[0]);
  Vector<T, V> given;
  if (stride == 1 && repeat == 1 && given.may_lie_at(from + cell)) {
    given = given.load(from + cell);
  } else {
    const bool all_one = stride == 0 || repeat % V == 0;
    given.values[0] = from[cell / repeat * stride];
#pragma unroll
    for (int i = 1; i < V; ++i) {
      given.values[i] = all_one ? given.values[0] : from[(cell + i) / repeat * stride];
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = Convert<Acc>::from(given.values[i]);
}

template <typename Acc, int V>
__device__ __forceinline__ void load_given(const TensorView& view, uint32_t repeat, uint32_t image,
                                           uint32_t map, uint32_t cell, Acc (&to)[V]) {
  switch (view.dtype) {
    case DType::float32:
      return load_given_as<float>(view, repeat, image, map, cell, to);
    case DType::float16:
      return load_given_as<Half>(view, repeat, image, map, cell, to);
    case DType::bfloat16:
      return load_given_as<BFloat16>(view, repeat, image, map, cell, to);
    default:
      return load_given_as<Bool>(view, repeat, image, map, cell, to);
  }
}

// The elements of a map as they lie in memory, so that those of many may be on their way.
template <typename Acc, typename Pred, typename Target>
struct PlanarMap {
  static constexpr int V = kVector<Pred, Target>;
  Vector<Pred, V> pred;
  Vector<Target, V> target;
  Vector<Acc, V> scale;  // grad_output, where it differs from cell to cell
};

// Where V cells lie: in this image, from this cell on.
struct Place {
  uint32_t image, cell;
};

// What the threads of the planar kernel do with V cells each. A warp goes through its steps
// together.
template <typename Acc, typename Pred, typename Target, bool kForward, bool kGeneral>
struct PlanarCells {
  using Map = PlanarMap<Acc, Pred, Target>;
  static constexpr int V = Map::V;

  const LossPass& pass;
  const BlockConstants<Acc>& constants;

  // Without kGeneral, the compiler knows all of these.
  __device__ bool has_kinds() const { return !kGeneral || pass.has_kinds; }
  __device__ bool has_weight() const { return kGeneral && pass.weight; }
  __device__ bool has_weight_per_cell() const {
    return has_weight() && pass.weight.map_stride == 0;
  }
  __device__ bool has_grad_output_per_cell() const {
    return kGeneral && !kForward && pass.has_grad_output_per_cell();
  }
  __device__ bool writes_cell_errors() const {
    return kGeneral && kForward && pass.errors && pass.output == Output::cell;
  }
  __device__ bool writes_element_errors() const {
    return kGeneral && kForward && pass.errors && pass.output == Output::element;
  }
  __device__ bool writes_zeros() const { return kForward || !pass.grad_is_for_one; }
  __device__ uint32_t pose_maps() const {
    return static_cast<uint32_t>(kGeneral ? pass.num_pose_maps() : pass.grid.maps - 1);
  }

  __device__ __forceinline__ void load(Map& to, Place place, uint32_t map) const {
    to.pred = to.pred.load(at<const Pred>(pass.pred, place.image, map, place.cell));
    to.target = to.target.load(at<const Target>(pass.target, place.image, map, place.cell));
    if (has_grad_output_per_cell()) {
      to.scale = to.scale.load(at<const Acc>(pass.grad_output, place.image, map, place.cell));
    }
  }

  __device__ __forceinline__ void load_weight(Place place, uint32_t map, Acc (&given)[V]) const {
    const auto repeat = has_weight_per_cell() ? static_cast<uint32_t>(pass.weight_repeat) : 1;
    load_given(pass.weight, repeat, place.image, map, place.cell, given);
  }

  // Element i of a map, where `counted` says whether its cell counts.
  __device__ __forceinline__ Element<Acc> element_of(const Map& map_data, int i,
                                                     ElementWeight<Acc> weight,
                                                     const Acc (&given)[V], bool& counted) const {
    if (has_grad_output_per_cell()) weight.coefficient *= map_data.scale.values[i];
    if (has_weight()) apply_weight(given[i], weight, counted);
    return element(counted, weight,
                   Convert<Acc>::from(map_data.pred.values[i]) -
                       Convert<Acc>::from(map_data.target.values[i]));
  }

  __device__ __forceinline__ void write(Place place, uint32_t map, const Acc (&grad)[V],
                                        const Acc (&error)[V]) const {
    if (pass.grad) store(at<Pred>(pass.grad, place.image, map, place.cell), grad);
    if (writes_element_errors()) store(at<Acc>(pass.errors, place.image, map, place.cell), error);
  }

  // Their confidences. Returns which of the cells have a pose that counts: bit i is cell i.
  __device__ __forceinline__ uint32_t confidences(Place place, const Map& confidence,
                                                  Acc (&cell_error)[V], Sums& sums) const {
    Acc given[V];
    uint32_t with_pose = 0;
    if (!has_kinds()) {
      if (has_weight_per_cell()) load_weight(place, 0, given);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        with_pose |= uint32_t(!has_weight_per_cell() || given[i] != Acc(0)) << i;
      }
      return with_pose;
    }
    if (has_weight()) load_weight(place, pose_maps(), given);
    Acc error[V], grad[V], is_positive[V];
    const bool has_positive = kGeneral && pass.positive;
    if (has_positive) {
      load_given_as<Bool>(pass.positive, 1, place.image, 0, place.cell, is_positive);
    }
    Acc positive_error = 0, negative_error = 0;
    int num_positive = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Acc target = Convert<Acc>::from(confidence.target.values[i]);
      const auto kind = has_positive ? kind_of(constants.of_pass, target, is_positive[i] != Acc(0))
                                     : kind_of(constants.of_pass, target);
      bool counted = kind.counted;
      const auto weight = confidence_weight(constants.of_pass, kind);
      const auto result = element_of(confidence, i, weight, given, counted);
      with_pose |= uint32_t(kind.positive && (!has_weight_per_cell() || counted)) << i;
      error[i] = cell_error[i] = result.error;
      grad[i] = result.gradient;
      positive_error += kind.positive ? error[i] : Acc(0);
      negative_error += kind.positive ? Acc(0) : error[i];
      num_positive += kind.positive && counted;
    }
    if (kForward) {
      sums.negative_conf += negative_error;
      if (with_pose) {
        sums.positive_conf += positive_error;
        sums.num_positive += num_positive;
      }
    }
    write(place, pose_maps(), grad, error);
    return with_pose;
  }

  __device__ __forceinline__ void zero_poses(Place place) const {
    constexpr Acc zeros[V] = {};
#pragma unroll 1
    for (uint32_t map = 0; map < pose_maps(); ++map) write(place, map, zeros, zeros);
  }

  // Some of their pose maps: every `step`-th from `first` on.
  __device__ __forceinline__ void poses(Place place, uint32_t with_pose, uint32_t first,
                                        uint32_t step, Acc (&cell_error)[V], Sums& sums) const {
    const uint32_t num_maps = pose_maps();
#pragma unroll 1
    for (; first < num_maps; first += kMapsAtOnce<V> * step) {
      Map maps[kMapsAtOnce<V>];
#pragma unroll
      for (int j = 0; j < kMapsAtOnce<V>; ++j) {
        if (first + j * step < num_maps) load(maps[j], place, first + j * step);
      }
#pragma unroll
      for (int j = 0; j < kMapsAtOnce<V>; ++j) {
        const uint32_t map = first + j * step;
        if (map >= num_maps) break;
        Acc given[V], grad[V], error[V], map_error = 0;
        if (has_weight()) load_weight(place, map, given);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          bool counted = with_pose >> i & 1;
          const auto result = element_of(maps[j], i, constants.of_pose(map), given, counted);
          error[i] = result.error;
          grad[i] = result.gradient;
          cell_error[i] += error[i];
          map_error += error[i];
        }
        if (kForward) sums.coord += map_error;
        write(place, map, grad, error);
      }
    }
  }

  __device__ __forceinline__ void write_cell_errors(Place place, Acc (&cell_error)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) cell_error[i] /= constants.divisor;
    store(at<Acc>(pass.errors, place.image, 0, place.cell), cell_error);
  }
};

// ---- interleaved: V elements that lie side by side ----------------------------------------------

// They are of one cell or of two, as there are V - 1 maps at least.
template <typename Acc, typename Pred, typename Target, bool kForward>
__device__ __forceinline__ void interleaved_elements(const LossPass& pass,
                                                     const BlockConstants<Acc>& constants,
                                                     uint32_t first, Sums& sums) {
  constexpr int V = kVector<Pred, Target>;
  using Constants = BlockConstants<Acc>;
  const uint32_t maps = static_cast<uint32_t>(pass.grid.maps);
  const uint32_t first_map = first % maps, of_first_cell = maps - first_map;
  const auto pred = Vector<Pred, V>::load(static_cast<const Pred*>(pass.pred.data) + first);
  const auto target = Vector<Target, V>::load(static_cast<const Target*>(pass.target.data) + first);
  // For both cells, the weight of the confidence, and a mask of those of the pose.
  struct Cell {
    uint32_t confidence, pose;
  };
  const auto cell_at = [&](uint32_t element) -> Cell {
    const auto* kinds = static_cast<const Target*>(pass.kinds.data) + element;
    const auto kind = kind_of(constants.of_pass, Convert<Acc>::from(*kinds));
    if (kind.positive) return {Constants::kPositive, ~0u};
    return {kind.counted ? Constants::kNegative : Constants::kMasked, 0};
  };
  const Cell one = cell_at(first - first_map);
  const Cell two = cell_at(first - first_map + (of_first_cell < V ? maps : 0));
  Acc error[V], grad[V], coord_error = 0, positive_error = 0, negative_error = 0;
  int num_positive = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const Cell cell = i < of_first_cell ? one : two;
    const uint32_t map = i + (i < of_first_cell ? first_map : first_map - maps);
    const bool is_confidence = map == maps - 1;
    const uint32_t kind = is_confidence ? cell.confidence : (Constants::kPose + map) & cell.pose;
    const auto result =
        element(kind != Constants::kMasked, constants.weights[kind],
                Convert<Acc>::from(pred.values[i]) - Convert<Acc>::from(target.values[i]));
    error[i] = result.error;
    grad[i] = result.gradient;
    coord_error += kind >= Constants::kPose ? error[i] : Acc(0);
    positive_error += kind == Constants::kPositive ? error[i] : Acc(0);
    negative_error += kind == Constants::kNegative ? error[i] : Acc(0);
    num_positive += kind == Constants::kPositive;
  }
  if (kForward) sums.add({coord_error, positive_error, negative_error, num_positive});
  if (pass.grad) store(static_cast<Pred*>(pass.grad.data) + first, grad);
  if (kForward && pass.errors) store(static_cast<Acc*>(pass.errors.data) + first, error);
}

// ---- strided: one cell --------------------------------------------------------------------------

template <typename Acc, typename Index, bool kForward>
__device__ __forceinline__ void strided_cell(const LossPass& pass,
                                             const BlockConstants<Acc>& constants, Index image,
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
  const auto do_element = [&](Index map, bool& counted, auto&& weight_of) {
    Element<Acc> result = {0, 0};
    ElementWeight<Acc> weight = {0, 0};
    if (counted) {
      weight = weight_of();
      if (pass.weight) apply_weight(load_element(pass.weight, weight_cell, map), weight, counted);
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
    kind = pass.positive ? kind_of(constants.of_pass, confidence,
                                   load_element(pass.positive, offset(pass.positive), 0) != Acc(0))
                         : kind_of(constants.of_pass, confidence);
  }
  Acc pose_error = 0, error = 0;
  for (Index map = 0; map < pose_maps; ++map) {
    bool counted = kind.positive;
    pose_error += do_element(map, counted, [&] {
      return ElementWeight<Acc>::of(pass.coord_weights.value(map), constants.of_pass.dloss_derror);
    });
  }
  bool counted = kind.counted;
  if (pose_maps < maps) {
    error =
        do_element(pose_maps, counted, [&] { return confidence_weight(constants.of_pass, kind); });
  }
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

template <typename Acc, typename Pred, typename Target, bool kForward, bool kGeneral>
__global__ void __launch_bounds__(kThreads, (planar_blocks<Pred, Target, kGeneral>()))
    planar_kernel(const __grid_constant__ LossPass pass, const Workspace workspace) {
  constexpr int V = kVector<Pred, Target>;
  __shared__ BlockConstants<Acc> constants;
  __shared__ uint16_t lists[kThreads];  // a warp's lanes with a pose, and which cells of them
  const PlanarCells<Acc, Pred, Target, kForward, kGeneral> cells{pass, constants};
  const uint32_t vectors_per_image = static_cast<uint32_t>(pass.grid.cells / V);
  const uint32_t vectors = static_cast<uint32_t>(pass.grid.images) * vectors_per_image;
  const uint32_t lane = threadIdx.x % kWarp;
  uint16_t* list = lists + (threadIdx.x - lane);
  const auto place_of = [&](uint32_t vector) -> Place {
    const uint32_t image = vector / vectors_per_image;
    return {image, (vector - image * vectors_per_image) * V};
  };
  uint32_t vector = uint32_t(blockIdx.x) * kThreads + threadIdx.x;
  // The confidences of a vector are asked for while the one before it is worked on; the general
  // kernel has no registers to spare for that.
  Place next_place = {};
  PlanarMap<Acc, Pred, Target> next_confidence;
  const auto load_confidence = [&] {
    if (vector >= vectors) return;
    next_place = place_of(vector);
    if (cells.has_kinds()) cells.load(next_confidence, next_place, cells.pose_maps());
  };
  if (!kGeneral && kForward) load_confidence();  // the constants take as long as that
  constants.set_up(pass);
  if (constants.nothing_to_do) return;
  if (!kGeneral && !kForward) load_confidence();
  Sums sums;
  while (vector - lane < vectors) {  // for all lanes of a warp or for none
    if (kGeneral) load_confidence();
    const uint32_t first_of_warp = vector - lane;
    const bool is_valid = vector < vectors;
    const Place place = next_place;
    const auto confidence = next_confidence;
    vector += uint32_t(gridDim.x) * kThreads;
    if (!kGeneral) load_confidence();

    Acc cell_error[V] = {};
    const uint32_t with_pose =
        is_valid ? cells.confidences(place, confidence, cell_error, sums) : 0;
    if (const uint32_t listed = __ballot_sync(kAllLanes, with_pose != 0)) {
      Place listed_place = place;
      uint32_t listed_pose = with_pose, first_map = 0, step = 1;
      const uint32_t count = __popc(listed);
      // Few vectors have a positive cell, so a warp shares out the pose maps of those that have
      // one: as many of their elements are on their way at once as it has lanes. Where most have
      // one, or where a lane adds up the errors of its cells over the maps, each keeps its own.
      if (count <= kWarp / 2 && !cells.writes_cell_errors()) {
        if (with_pose) {
          list[__popc(listed & ((1u << lane) - 1))] = static_cast<uint16_t>(lane | with_pose << 8);
        }
        __syncwarp();
        // So many lanes, a power of two, work on one map.
        const uint32_t log2_lanes = count > 1 ? kWarp - __clz(count - 1) : 0;
        const uint32_t mine = lane & ((1u << log2_lanes) - 1);
        const uint32_t entry = mine < count ? list[mine] : 0;
        __syncwarp();  // the list is read before the next is written
        listed_place = place_of(first_of_warp + entry % kWarp);
        listed_pose = entry >> 8;
        first_map = lane >> log2_lanes;
        step = kWarp >> log2_lanes;
      }
      if (listed_pose) {
        cells.poses(listed_place, listed_pose, first_map, step, cell_error, sums);
      }
    }
    // After the poses: reads wait for what was written before them.
    if (is_valid && !with_pose && cells.writes_zeros()) cells.zero_poses(place);
    if (is_valid && cells.writes_cell_errors()) cells.write_cell_errors(place, cell_error);
  }
  if (kForward) finish_pass<Acc>(pass, workspace, sums);
}

template <typename Acc, typename Pred, typename Target, bool kForward>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    interleaved_kernel(const __grid_constant__ LossPass pass, const Workspace workspace) {
  __shared__ BlockConstants<Acc> constants;
  constants.set_up(pass);
  if (constants.nothing_to_do) return;
  constexpr int V = kVector<Pred, Target>;
  const uint32_t elements =
      static_cast<uint32_t>(pass.grid.images * pass.grid.cells * pass.grid.maps);
  Sums sums;
#pragma unroll 4  // so that the reads of several iterations are on their way at once
  for (uint32_t first = (uint32_t(blockIdx.x) * kThreads + threadIdx.x) * V; first < elements;
       first += uint32_t(gridDim.x) * kThreads * V) {
    interleaved_elements<Acc, Pred, Target, kForward>(pass, constants, first, sums);
  }
  if (kForward) finish_pass<Acc>(pass, workspace, sums);
}

template <typename Acc, typename Index, bool kForward>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    strided_kernel(const __grid_constant__ LossPass pass, const Workspace workspace) {
  __shared__ BlockConstants<Acc> constants;
  constants.set_up(pass);
  if (constants.nothing_to_do) return;
  const Index cells_per_image = static_cast<Index>(pass.grid.cells);
  const Index cells = static_cast<Index>(pass.grid.images) * cells_per_image;
  Sums sums;
  for (Index at = Index(blockIdx.x) * kThreads + threadIdx.x; at < cells;
       at += Index(gridDim.x) * kThreads) {
    const Index image = at / cells_per_image;
    strided_cell<Acc, Index, kForward>(pass, constants, image, at - image * cells_per_image, sums);
  }
  if (kForward) finish_pass<Acc>(pass, workspace, sums);
}

// ---- the sum of weights -------------------------------------------------------------------------

// The sum of `count` weights times `repeats`, infinity for 0, in one read of them: the divisor of
// masked_mse_loss's mean. A thread takes 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    weight_sum_kernel(const T* weights, int64_t count, int64_t repeats, double* sum,
                      const Workspace workspace) {
  constexpr int V = 16 / sizeof(T);
  using Weights = Vector<T, V>;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t vectors = Weights::may_lie_at(weights) ? count / V : 0;
  Sums sums;
  const auto add = [&](T weight) {
    if constexpr (std::is_same_v<T, Bool>) {
      sums.num_positive += static_cast<int>(to_float(weight));
    } else {
      sums.coord += Convert<double>::from(weight);
    }
  };
  for (int64_t i = first; i < vectors; i += stride) {
    const auto some = Weights::load(weights + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) add(some.values[j]);
  }
  for (int64_t i = vectors * V + first; i < count; i += stride) add(weights[i]);
  finish(workspace, sums, [&](const Sums& all) {
    *sum = divisor_of_mean(all.coord + static_cast<double>(all.num_positive), repeats);
  });
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
         pass.grid.maps >= v - 1 && pass.grid.maps <= kPoseWeights &&
         pass.grid.cells * pass.grid.maps % v == 0 && pass.all_views([&](const TensorView& view) {
           return view.is_interleaved(pass.grid) &&
                  reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
         });
}

// As many blocks as the threads fill, but no more than can run at once: those that came later would
// set up and add sums a second time.
inline unsigned num_blocks(int64_t threads, int64_t resident_blocks) {
  const int64_t wanted = (threads + kThreads - 1) / kThreads;
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(wanted, resident_blocks)));
}

template <typename Index, bool kForward, typename Launch>
void run_strided(const LossPass& pass, Launch&& launch) {
  const int64_t cells = pass.grid.images * pass.grid.cells;
  if (is_double(pass.pred.dtype, pass.target.dtype)) {
    launch(strided_kernel<double, Index, kForward>, cells);
  } else {
    launch(strided_kernel<float, Index, kForward>, cells);
  }
}

// Launches the vector kernel for a pair of dtypes; false where the layout does not allow it.
template <typename Acc, typename Pred, typename Target, bool kForward, typename Launch>
bool run_vector(const LossPass& pass, Launch&& launch) {
  constexpr int V = kVector<Pred, Target>;
  const int64_t cells = pass.grid.images * pass.grid.cells;
  if (pass.pred.dtype != DTypeOf<Pred>::value || pass.target.dtype != DTypeOf<Target>::value ||
      pass.weight.dtype == DType::float64 || pass.coord_weights.count > kPoseWeights) {
    return false;
  }
  if (is_vector_planar(pass, V)) {
    if (pass.is_plain() && pass.output == Output::scalar) {
      launch(planar_kernel<Acc, Pred, Target, kForward, false>, cells / V);
    } else {
      launch(planar_kernel<Acc, Pred, Target, kForward, true>, cells / V);
    }
    return true;
  }
  if (is_vector_interleaved(pass, V)) {
    launch(interleaved_kernel<Acc, Pred, Target, kForward>, cells * pass.grid.maps / V);
    return true;
  }
  return false;
}

// Vectors for the pairs of dtypes that training meets; the others, float64 among them, and tensors
// of 2^31 elements and more, which few have the memory for, go element by element.
template <bool kForward, typename Launch>
void run_kernel(const LossPass& pass, bool wide_index, Launch&& launch) {
  const auto run = [&]<typename Pred, typename Target>(Pred, Target) {
    return run_vector<float, Pred, Target, kForward>(pass, launch);
  };
  if (wide_index) {
    run_strided<int64_t, kForward>(pass, launch);
  } else if (!run(float{}, float{}) && !run(BFloat16{}, float{}) && !run(Half{}, float{}) &&
             !run(BFloat16{}, BFloat16{}) && !run(Half{}, Half{})) {
    run_strided<uint32_t, kForward>(pass, launch);
  }
}

// Chooses the kernel for a pass and calls `launch(kernel, threads)`, which is to launch it with so
// many threads if num_blocks() lets it, kThreads a block, the pass and, for a pass that takes sums,
// a Workspace of so many blocks.
template <typename Launch>
void run_pass(const LossPass& pass, Launch&& launch, bool wide_index = false) {
  wide_index = wide_index || !fits_32_bits(pass);
  if (pass.is_forward()) {
    run_kernel<true>(pass, wide_index, launch);
  } else {
    run_kernel<false>(pass, wide_index, launch);
  }
}

}  // namespace fcrn::cuda
