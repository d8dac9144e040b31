// The loops over the cells of a chunk, around the arithmetic of cell_loss.h. Compiled once for each
// instruction set, in a namespace of its own: define FCRN_INSTRUCTION_SET before including this.
//
// A block of 16 cells, one cache line of float32, is the unit of everything: where none of its
// cells is positive, the pose maps are not read at all. A block is computed in vectors of the
// machine's width. Errors are added up in 16 lanes, for at most 128 cells in the accumulator's type
// and from there on in double; the lanes are added in order at the end.
#pragma once

#include <cstring>

#include "fcrn_loss_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fcrn::cpu::FCRN_INSTRUCTION_SET {
namespace {

constexpr int kBlock = 16;
constexpr int kChunkBlocks = kChunkCells / kBlock;
constexpr int kBlocksBetweenFlushes = 8;

// ---- vectors ------------------------------------------------------------------------------------

#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename Acc>
using Vector = typename VectorOf<Acc>::type;
template <typename Acc>
constexpr int kLanes = kVectorBytes / sizeof(Acc);

template <typename Acc>
inline Vector<Acc> vector_at(const Acc* from) {
  Vector<Acc> vector;
  memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename Acc>
inline void put_at(Acc* to, Vector<Acc> vector) {
  memcpy(to, &vector, sizeof(vector));
}

template <typename Acc>
inline Vector<Acc> splat(Acc value) {
  return Vector<Acc>{} + value;
}

// Number of lanes that are set in a mask.
template <typename Mask>
inline int count_set(Mask mask) {
#if defined(__AVX2__)
  if constexpr (sizeof(mask[0]) == 4) {
    return __builtin_popcount(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
  } else {
    return __builtin_popcount(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
  }
#else
  int set = 0;
  for (unsigned i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) set -= static_cast<int>(mask[i]);
  return set;
#endif
}

template <typename Mask>
inline bool any_set(Mask mask) {
#if defined(__AVX2__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  return count_set(mask) != 0;
#endif
}

// ---- memory -------------------------------------------------------------------------------------

template <typename Acc, typename T>
inline void load_whole_block(const T* from, Acc* to) {
#if defined(__F16C__)
  if constexpr (DTypeOf<T>::value == DType::float16 && sizeof(Acc) == sizeof(float)) {
    for (int i = 0; i < kBlock; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
    return;
  }
#endif
  for (int i = 0; i < kBlock; ++i) to[i] = Convert<Acc>::from(from[i]);
}

// A whole block in the type of the arithmetic: where it lies if it is in that, else in `scratch`.
template <typename Acc, typename T>
inline const Acc* whole_block(const T* from, Acc* scratch) {
  if constexpr (DTypeOf<T>::value == DTypeOf<Acc>::value) {
    return from;
  } else {
    load_whole_block(from, scratch);
    return scratch;
  }
}

// The same for the first `count` cells of a block; the rest is 0.
template <typename Acc, typename T>
inline const Acc* block_of(const T* from, int count, Acc* scratch) {
  if (count == kBlock) return whole_block(from, scratch);
  T padded[kBlock] = {};
  memcpy(padded, from, count * sizeof(T));
  load_whole_block(padded, scratch);
  return scratch;
}

// Writes whole 16-byte units, past the caches if asked and if they are aligned.
template <int kBytes>
inline void store_bytes(void* to, const void* from, bool stream) {
#if defined(__x86_64__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (int i = 0; i < kBytes; i += 16) {
      const auto* unit = reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + i);
      _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + i),
                       _mm_load_si128(unit));
    }
    return;
  }
#endif
  memcpy(to, from, kBytes);
}

template <typename T, typename Acc>
inline void store_block(T* to, const Acc* from, int count, bool stream) {
  alignas(64) T block[kBlock];
#if defined(__F16C__)
  if constexpr (DTypeOf<T>::value == DType::float16 && sizeof(Acc) == sizeof(float)) {
    for (int i = 0; i < kBlock; i += 8) {
      const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_store_si128(reinterpret_cast<__m128i*>(block + i), halves);
    }
  } else
#endif
    for (int i = 0; i < kBlock; ++i) block[i] = Convert<T>::from(from[i]);
  if (count == kBlock) {
    store_bytes<sizeof(block)>(to, block, stream);
  } else {
    memcpy(to, block, count * sizeof(T));
  }
}

template <typename T>
inline void store_zeros(T* to, int64_t count, bool stream) {
  if (!stream) {
    memset(to, 0, count * sizeof(T));
    return;
  }
  alignas(64) static constexpr char zeros[kBlock * sizeof(T)] = {};
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) store_bytes<sizeof(zeros)>(to + i, zeros, true);
  memset(to + i, 0, (count - i) * sizeof(T));
}

// ---- sums ---------------------------------------------------------------------------------------

// Errors of one kind, by lanes: `recent` for a few blocks, then `all`.
template <typename Acc>
struct LaneSums {
  alignas(64) Acc recent[kBlock] = {};
  alignas(64) double all[kBlock] = {};
  int recent_blocks = 0;

  void add(int lane, Vector<Acc> errors) {
    put_at(recent + lane, vector_at(recent + lane) + errors);
  }

  void end_block() {
    if (++recent_blocks == kBlocksBetweenFlushes) flush();
  }

  void flush() {
    for (int i = 0; i < kBlock; ++i) all[i] += recent[i];
    memset(recent, 0, sizeof(recent));
    recent_blocks = 0;
  }

  double total() {
    flush();
    for (int width = kBlock / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) all[i] += all[i + width];
    }
    return all[0];
  }
};

template <typename Acc>
struct CellSums {
  LaneSums<Acc> coord, positive_conf, negative_conf;
  int64_t num_positive = 0;
};

// ---- the loops ----------------------------------------------------------------------------------

template <typename Acc>
struct Coefficients {  // of a gradient: 2 * w * dloss/dE
  Acc negative, positive;
};

// Everything about a pass that the loops want at hand, in the types they work with.
template <typename Acc, typename Pred, typename Target>
class Loops {
 public:
  explicit Loops(const ChunkPlan& plan)
      : pass_(plan.pass),
        rule_(plan.pass.rule<Acc>()),
        dloss_derror_(plan.dloss_derror),
        conf_{coefficient(plan.pass.negative_weight.value()),
              coefficient(plan.pass.positive_weight)},
        per_cell_(plan.pass.grad_output && plan.pass.has_grad_output_per_cell()),
        per_cell_error_(plan.pass.errors && plan.pass.reduction == Reduction::cell),
        per_element_error_(plan.pass.errors && plan.pass.reduction == Reduction::none),
        stream_(plan.stream) {}

  // Cells [begin, end) of an image, all tensors planar: first the confidences, then map by map.
  void planar(int64_t image, int64_t begin, int64_t end, CellSums<Acc>& sums) const {
    bool block_is_positive[kChunkBlocks];
    alignas(64) Acc cell_error[kChunkCells];
    const int64_t last_map = pass_.grid.maps - 1;
    const int64_t count = end - begin;
    for (int64_t at = 0; at < count; at += kBlock) {
      for (const int64_t end_of_run = at + negative_blocks(image, begin + at, count - at, sums);
           at < end_of_run; at += kBlock) {
        block_is_positive[at / kBlock] = false;
      }
      if (at == count) break;
      block_is_positive[at / kBlock] =
          confidence_block(image, begin + at, block_size(count - at), cell_error + at, sums);
    }
    for (int64_t map = 0; map < last_map; ++map) {
      const PoseMap pose = pose_map(map);
      for (int64_t at = 0; at < count;) {
        if (block_is_positive[at / kBlock]) {
          pose_block(pose, image, begin + at, block_size(count - at), cell_error + at, sums);
          at += kBlock;
          continue;
        }
        const int64_t run_begin = at;
        while (at < count && !block_is_positive[at / kBlock]) at += kBlock;
        const int64_t run = (at < count ? at : count) - run_begin;
        if (pass_.grad && !pass_.grad_is_for_one) {
          store_zeros(element<Pred>(pass_.grad, image, map, begin + run_begin), run, stream_);
        }
        if (per_element_error_) {
          store_zeros(element<Acc>(pass_.errors, image, map, begin + run_begin), run, stream_);
        }
      }
    }
    if (per_cell_error_) {
      Acc* errors = element<Acc>(pass_.errors, image, 0, begin);
      for (int64_t i = 0; i < count; ++i) errors[i] = cell_error[i] / pass_.grid.maps;
    }
  }

  // Cells [begin, end) of an image, any strides: cell by cell.
  void strided(int64_t image, int64_t begin, int64_t end, CellSums<Acc>& sums) const {
    const Grid& grid = pass_.grid;
    const int64_t last_map = grid.maps - 1;
    for (int64_t cell = begin; cell < end; ++cell) {
      const Pred* pred = at<Pred>(pass_.pred, image, cell);
      const Target* target = at<Target>(pass_.target, image, cell);
      Pred* grad = at<Pred>(pass_.grad, image, cell);
      Acc* errors = at<Acc>(pass_.errors, image, cell);
      const Acc* grad_output = per_cell_ ? at<Acc>(pass_.grad_output, image, cell) : nullptr;
      const int lane = static_cast<int>(cell % kBlock);

      const Pred conf_pred = pred[last_map * pass_.pred.map_stride];
      const Target conf_target = target[last_map * pass_.target.map_stride];
      const Acc confidence =
          pass_.kinds_from_pred ? Convert<Acc>::from(conf_pred) : Convert<Acc>::from(conf_target);
      const bool positive = is_positive(rule_, confidence);
      Acc cell_error = 0;
      for (int64_t map = 0; map < last_map; ++map) {
        Acc error = 0, slope = 0;
        if (positive) {
          const PoseMap pose = pose_map(map);
          const Acc d = difference<Acc>(pred[map * pass_.pred.map_stride],
                                        target[map * pass_.target.map_stride]);
          error = weighted_error(pose.weight, d);
          slope = gradient(scaled(pose.coefficient, grad_output, map), d);
          sums.coord.all[lane] += error;
          cell_error += error;
        }
        if (grad && (positive || !pass_.grad_is_for_one)) {
          grad[map * pass_.grad.map_stride] = Convert<Pred>::from(slope);
        }
        if (per_element_error_) errors[map * pass_.errors.map_stride] = error;
      }
      Acc error = 0, slope = 0;
      if (is_counted(rule_, confidence)) {
        const Acc d = difference<Acc>(conf_pred, conf_target);
        error = weighted_error(positive ? rule_.positive_weight : rule_.negative_weight, d);
        slope =
            gradient(scaled(positive ? conf_.positive : conf_.negative, grad_output, last_map), d);
        (positive ? sums.positive_conf : sums.negative_conf).all[lane] += error;
        sums.num_positive += positive;
      }
      if (grad) grad[last_map * pass_.grad.map_stride] = Convert<Pred>::from(slope);
      if (per_element_error_) errors[last_map * pass_.errors.map_stride] = error;
      if (per_cell_error_) *errors = (cell_error + error) / grid.maps;
    }
  }

 private:
  Acc coefficient(double weight) const {
    return static_cast<Acc>(gradient_coefficient(weight, dloss_derror_));
  }

  Acc scaled(Acc coefficient, const Acc* grad_output, int64_t map) const {
    return grad_output ? coefficient * grad_output[map * pass_.grad_output.map_stride]
                       : coefficient;
  }

  template <typename T>
  static T* element(const TensorView& view, int64_t image, int64_t map, int64_t cell) {
    return static_cast<T*>(view.data) + image * view.image_stride + map * view.map_stride + cell;
  }

  template <typename T>
  T* at(const TensorView& view, int64_t image, int64_t cell) const {
    return view ? static_cast<T*>(view.data) + view.cell_offset(pass_.grid, image, cell) : nullptr;
  }

  struct PoseMap {
    int64_t map;
    Acc weight, coefficient;
  };

  PoseMap pose_map(int64_t map) const {
    const double weight = pass_.coord_weights.value(map);
    return {map, static_cast<Acc>(weight), coefficient(weight)};
  }

  static int block_size(int64_t left) { return left < kBlock ? static_cast<int>(left) : kBlock; }

  // The confidences of the whole blocks from `cell` on that have no positive cell, up to the first
  // that has one: nearly all of them. Returns their number of cells.
  inline int64_t negative_blocks(int64_t image, int64_t cell, int64_t count,
                                 CellSums<Acc>& sums) const {
    using V = Vector<Acc>;
    if (per_cell_ || per_cell_error_ || per_element_error_) return 0;
    const int64_t map = pass_.grid.maps - 1;
    const Pred* preds = element<const Pred>(pass_.pred, image, map, cell);
    const Target* targets = element<const Target>(pass_.target, image, map, cell);
    Pred* grads = pass_.grad ? element<Pred>(pass_.grad, image, map, cell) : nullptr;
    alignas(64) Acc scratch[2][kBlock], slope[kBlock];
    V error[kBlock / kLanes<Acc>] = {};  // in registers
    const V weight = splat(rule_.negative_weight), coefficient = splat(conf_.negative);
    int blocks = 0;
    const auto flush = [&] {
      for (int i = 0; i < kBlock; i += kLanes<Acc>) {
        sums.negative_conf.add(i, error[i / kLanes<Acc>]);
        error[i / kLanes<Acc>] = V{};
      }
      sums.negative_conf.flush();
      blocks = 0;
    };
    sums.negative_conf.flush();
    int64_t at = 0;
    for (; at + kBlock <= count; at += kBlock) {
      const Acc* pred = whole_block(preds + at, scratch[0]);
      const Acc* target = whole_block(targets + at, scratch[1]);
      const Acc* confidence = pass_.kinds_from_pred ? pred : target;
      auto positive = is_positive(rule_, vector_at(confidence));
      for (int i = kLanes<Acc>; i < kBlock; i += kLanes<Acc>) {
        positive |= is_positive(rule_, vector_at(confidence + i));
      }
      if (any_set(positive)) break;
      for (int i = 0; i < kBlock; i += kLanes<Acc>) {
        const auto counted = is_counted(rule_, vector_at(confidence + i));
        const V d = vector_at(pred + i) - vector_at(target + i);
        error[i / kLanes<Acc>] += counted ? weighted_error(weight, d) : V{};
        put_at(slope + i, counted ? gradient(coefficient, d) : V{});
      }
      if (grads) store_block(grads + at, slope, kBlock, stream_);
      if (++blocks == kBlocksBetweenFlushes) flush();
    }
    if (blocks > 0) flush();
    return at;
  }

  // The confidences of a block; true if a cell of it is positive.
  inline bool confidence_block(int64_t image, int64_t cell, int count, Acc* cell_error,
                               CellSums<Acc>& sums) const {
    using V = Vector<Acc>;
    const int64_t map = pass_.grid.maps - 1;
    alignas(64) Acc scratch[3][kBlock], error[kBlock], slope[kBlock];
    const Acc* pred =
        block_of(element<const Pred>(pass_.pred, image, map, cell), count, scratch[0]);
    const Acc* target =
        block_of(element<const Target>(pass_.target, image, map, cell), count, scratch[1]);
    const Acc* scale = scales(image, map, cell, count, scratch[2]);
    const Acc* confidence = pass_.kinds_from_pred ? pred : target;
    int num_positive = 0;
    for (int i = 0; i < kBlock; i += kLanes<Acc>) {
      const auto positive = is_positive(rule_, vector_at(confidence + i));
      const auto counted = is_counted(rule_, vector_at(confidence + i));
      const V d = vector_at(pred + i) - vector_at(target + i);
      const V weight = positive ? splat(rule_.positive_weight) : splat(rule_.negative_weight);
      V coefficient = positive ? splat(conf_.positive) : splat(conf_.negative);
      if (scale) coefficient *= vector_at(scale + i);
      put_at(error + i, counted ? weighted_error(weight, d) : V{});
      put_at(slope + i, counted ? gradient(coefficient, d) : V{});
      num_positive += count_set(positive);
    }
    if (pass_.wants_sums) {
      for (int i = count; i < kBlock; ++i) error[i] = 0;
      for (int i = 0; i < kBlock; i += kLanes<Acc>) {
        const auto positive = is_positive(rule_, vector_at(confidence + i));
        sums.positive_conf.add(i, positive ? vector_at(error + i) : V{});
        sums.negative_conf.add(i, positive ? V{} : vector_at(error + i));
      }
      sums.positive_conf.end_block();
      sums.negative_conf.end_block();
      sums.num_positive += num_positive;
    }
    if (pass_.grad) store_block(element<Pred>(pass_.grad, image, map, cell), slope, count, stream_);
    if (per_element_error_) {
      store_block(element<Acc>(pass_.errors, image, map, cell), error, count, stream_);
    }
    if (per_cell_error_) memcpy(cell_error, error, count * sizeof(Acc));
    return num_positive > 0;
  }

  // One pose map of a block with a positive cell.
  inline void pose_block(const PoseMap& pose, int64_t image, int64_t cell, int count,
                         Acc* cell_error, CellSums<Acc>& sums) const {
    using V = Vector<Acc>;
    const int64_t map = pose.map, last_map = pass_.grid.maps - 1;
    alignas(64) Acc scratch[4][kBlock], error[kBlock], slope[kBlock];
    const Acc* confidence =
        pass_.kinds_from_pred
            ? block_of(element<const Pred>(pass_.pred, image, last_map, cell), count, scratch[0])
            : block_of(element<const Target>(pass_.target, image, last_map, cell), count,
                       scratch[0]);
    const Acc* pred =
        block_of(element<const Pred>(pass_.pred, image, map, cell), count, scratch[1]);
    const Acc* target =
        block_of(element<const Target>(pass_.target, image, map, cell), count, scratch[2]);
    const Acc* scale = scales(image, map, cell, count, scratch[3]);
    for (int i = 0; i < kBlock; i += kLanes<Acc>) {
      const auto positive = is_positive(rule_, vector_at(confidence + i));
      const V d = vector_at(pred + i) - vector_at(target + i);
      V coefficient = splat(pose.coefficient);
      if (scale) coefficient *= vector_at(scale + i);
      const V e = positive ? weighted_error(splat(pose.weight), d) : V{};
      sums.coord.add(i, e);
      put_at(error + i, e);
      put_at(slope + i, positive ? gradient(coefficient, d) : V{});
    }
    sums.coord.end_block();
    if (pass_.grad) store_block(element<Pred>(pass_.grad, image, map, cell), slope, count, stream_);
    if (per_element_error_) {
      store_block(element<Acc>(pass_.errors, image, map, cell), error, count, stream_);
    }
    if (per_cell_error_) {
      for (int i = 0; i < count; ++i) cell_error[i] += error[i];
    }
  }

  // What a block's gradient is multiplied by, if that differs from cell to cell; else nullptr.
  inline const Acc* scales(int64_t image, int64_t map, int64_t cell, int count,
                           Acc* scratch) const {
    if (!per_cell_) return nullptr;
    return block_of(element<const Acc>(pass_.grad_output, image, map, cell), count, scratch);
  }

  const LossPass pass_;
  const CellRule<Acc> rule_;
  const double dloss_derror_;
  const Coefficients<Acc> conf_;
  const bool per_cell_;           // grad_output differs from cell to cell
  const bool per_cell_error_;     // "cell"
  const bool per_element_error_;  // "none"
  const bool stream_;
};

template <typename Acc, typename Pred, typename Target>
void run_chunks_of(const ChunkPlan& plan, int64_t first, int64_t last, ChunkSums* sums) {
  const Loops<Acc, Pred, Target> loops(plan);
  const Grid& grid = plan.pass.grid;
  const int64_t all_cells = grid.images * grid.cells;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t chunk_begin = chunk * kChunkCells;
    const int64_t chunk_end =
        chunk_begin + kChunkCells < all_cells ? chunk_begin + kChunkCells : all_cells;
    CellSums<Acc> sums_of_chunk;
    for (int64_t at = chunk_begin; at < chunk_end;) {
      const int64_t image = at / grid.cells, begin = at % grid.cells;
      const int64_t left = chunk_end - at;
      const int64_t end = begin + left < grid.cells ? begin + left : grid.cells;
      if (plan.planar) {
        loops.planar(image, begin, end, sums_of_chunk);
      } else {
        loops.strided(image, begin, end, sums_of_chunk);
      }
      at += end - begin;
    }
    sums[chunk - first] = {sums_of_chunk.coord.total(), sums_of_chunk.positive_conf.total(),
                           sums_of_chunk.negative_conf.total(), sums_of_chunk.num_positive};
  }
#if defined(__x86_64__)
  if (plan.stream) _mm_sfence();
#endif
}

template <typename Pred>
void run_chunks_of_pred(const ChunkPlan& plan, int64_t first, int64_t last, ChunkSums* sums) {
  switch (plan.pass.target.dtype) {
    case DType::float64:
      return run_chunks_of<double, Pred, double>(plan, first, last, sums);
    case DType::float32:
      if constexpr (DTypeOf<Pred>::value == DType::float64) {
        return run_chunks_of<double, Pred, float>(plan, first, last, sums);
      } else {
        return run_chunks_of<float, Pred, float>(plan, first, last, sums);
      }
    case DType::float16:
      if constexpr (DTypeOf<Pred>::value == DType::float64) {
        return run_chunks_of<double, Pred, Half>(plan, first, last, sums);
      } else {
        return run_chunks_of<float, Pred, Half>(plan, first, last, sums);
      }
    case DType::bfloat16:
      if constexpr (DTypeOf<Pred>::value == DType::float64) {
        return run_chunks_of<double, Pred, BFloat16>(plan, first, last, sums);
      } else {
        return run_chunks_of<float, Pred, BFloat16>(plan, first, last, sums);
      }
  }
}

}  // namespace

void run_chunks(const ChunkPlan& plan, int64_t first, int64_t last, ChunkSums* sums) {
  switch (plan.pass.pred.dtype) {
    case DType::float64:
      return run_chunks_of_pred<double>(plan, first, last, sums);
    case DType::float32:
      return run_chunks_of_pred<float>(plan, first, last, sums);
    case DType::float16:
      return run_chunks_of_pred<Half>(plan, first, last, sums);
    case DType::bfloat16:
      return run_chunks_of_pred<BFloat16>(plan, first, last, sums);
  }
}

}  // namespace fcrn::cpu::FCRN_INSTRUCTION_SET
