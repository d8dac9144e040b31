// The loops over the cells of a chunk, around the arithmetic of cell_loss.h. Compiled once for each
// instruction set, in a namespace of its own: define FCRN_INSTRUCTION_SET before including this.
//
// A block of 16 cells, one cache line of float32, is the unit of everything: its cells are loaded
// into arrays that the compiler keeps in vector registers, and where none of them is positive, the
// pose maps are not read at all. Sums go to 16 double lanes, which are added in order at the end.
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

template <typename Acc, typename T>
inline void load_block(const T* from, int count, Acc* to) {
  for (int i = 0; i < count; ++i) to[i] = Convert<Acc>::from(from[i]);
}

template <typename Acc, typename T>
inline void load_block(const T* from, Acc* to) {
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

// Writes bytes that fill whole 16-byte units, past the caches if asked and if they are aligned.
template <int kBytes>
inline void store_bytes(void* to, const void* from, bool stream) {
#if defined(__x86_64__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (int i = 0; i < kBytes; i += 16) {
      const auto* unit = reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + i);
      _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + i), _mm_load_si128(unit));
    }
    return;
  }
#endif
  memcpy(to, from, kBytes);
}

template <typename T, typename Acc>
inline void store_block(T* to, const Acc* from, bool stream) {
  alignas(64) T block[kBlock];
#if defined(__F16C__)
  if constexpr (DTypeOf<T>::value == DType::float16 && sizeof(Acc) == sizeof(float)) {
    for (int i = 0; i < kBlock; i += 8) {
      const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_store_si128(reinterpret_cast<__m128i*>(block + i), halves);
    }
    store_bytes<sizeof(block)>(to, block, stream);
    return;
  }
#endif
  for (int i = 0; i < kBlock; ++i) block[i] = Convert<T>::from(from[i]);
  store_bytes<sizeof(block)>(to, block, stream);
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

template <typename Acc>
struct Coefficients {  // of a gradient: 2 * w * dloss/dE
  Acc negative, positive;
};

struct Lanes {
  double coord[kBlock] = {}, positive_conf[kBlock] = {}, negative_conf[kBlock] = {};
  int64_t num_positive = 0;

  static double sum(const double* lanes) {
    double sums[kBlock];
    memcpy(sums, lanes, sizeof(sums));
    for (int width = kBlock / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
  }

  ChunkSums total() const {
    return {sum(coord), sum(positive_conf), sum(negative_conf), num_positive};
  }
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
  void planar(int64_t image, int64_t begin, int64_t end, Lanes& lanes) const {
    bool block_is_positive[kChunkBlocks];
    alignas(64) Acc cell_error[kChunkCells];
    const int64_t last_map = pass_.grid.maps - 1;
    const int64_t count = end - begin;
    for (int64_t at = 0, block = 0; at < count; at += kBlock, ++block) {
      const int64_t left = count - at;
      block_is_positive[block] =
          left >= kBlock
              ? confidence_block<true>(image, last_map, begin + at, kBlock, cell_error + at, lanes)
              : confidence_block<false>(image, last_map, begin + at, static_cast<int>(left),
                                        cell_error + at, lanes);
    }
    for (int64_t map = 0; map < last_map; ++map) {
      const double weight = pass_.coord_weights.value(map);
      const Acc coefficient = this->coefficient(weight);
      for (int64_t at = 0, block = 0; at < count;) {
        const int64_t left = count - at;
        if (block_is_positive[block]) {
          if (left >= kBlock) {
            pose_block<true>(image, map, begin + at, kBlock, static_cast<Acc>(weight), coefficient,
                             cell_error + at, lanes);
          } else {
            pose_block<false>(image, map, begin + at, static_cast<int>(left),
                              static_cast<Acc>(weight), coefficient, cell_error + at, lanes);
          }
          at += kBlock, ++block;
          continue;
        }
        const int64_t run_begin = at;
        do {
          at += kBlock, ++block;
        } while (at < count && !block_is_positive[block]);
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
  void strided(int64_t image, int64_t begin, int64_t end, Lanes& lanes) const {
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
      const CellKind kind =
          cell_kind(rule_, pass_.kinds_from_pred ? Convert<Acc>::from(conf_pred)
                                                 : Convert<Acc>::from(conf_target));
      const bool positive = kind == CellKind::positive;
      Acc cell_error = 0;
      for (int64_t map = 0; map < last_map; ++map) {
        Acc error = 0, slope = 0;
        if (positive) {
          const double weight = pass_.coord_weights.value(map);
          const Acc d = difference<Acc>(pred[map * pass_.pred.map_stride],
                                        target[map * pass_.target.map_stride]);
          error = weighted_error(static_cast<Acc>(weight), d);
          slope = gradient(scaled(coefficient(weight), grad_output, map), d);
          lanes.coord[lane] += error;
          cell_error += error;
        }
        if (grad && (positive || !pass_.grad_is_for_one)) {
          grad[map * pass_.grad.map_stride] = Convert<Pred>::from(slope);
        }
        if (per_element_error_) errors[map * pass_.errors.map_stride] = error;
      }
      Acc error = 0, slope = 0;
      if (kind != CellKind::ignored) {
        const Acc d = difference<Acc>(conf_pred, conf_target);
        error = weighted_error(confidence_weight(rule_, kind), d);
        slope = gradient(scaled(positive ? conf_.positive : conf_.negative, grad_output, last_map), d);
        (positive ? lanes.positive_conf : lanes.negative_conf)[lane] += error;
        lanes.num_positive += positive;
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

  // The confidences of a block; true if a cell of it is positive.
  template <bool kFull>
  inline bool confidence_block(int64_t image, int64_t map, int64_t cell, int left, Acc* cell_error,
                               Lanes& lanes) const {
    const int count = kFull ? kBlock : left;
    alignas(64) Acc pred[kBlock], target[kBlock], error[kBlock], slope[kBlock], scale[kBlock];
    load<kFull>(element<const Pred>(pass_.pred, image, map, cell), count, pred);
    load<kFull>(element<const Target>(pass_.target, image, map, cell), count, target);
    const Acc* confidence = pass_.kinds_from_pred ? pred : target;
    int num_positive = 0;
    for (int i = 0; i < count; ++i) {
      num_positive += cell_kind(rule_, confidence[i]) == CellKind::positive;
    }
    if (per_cell_) {
      load<kFull>(element<const Acc>(pass_.grad_output, image, map, cell), count, scale);
    }
    for (int i = 0; i < count; ++i) {
      const CellKind kind = cell_kind(rule_, confidence[i]);
      const bool positive = kind == CellKind::positive;
      const Acc d = difference<Acc>(pred[i], target[i]);
      const Acc e = weighted_error(confidence_weight(rule_, kind), d);
      Acc c = positive ? conf_.positive : conf_.negative;
      if (per_cell_) c *= scale[i];
      const Acc g = gradient(c, d);
      error[i] = kind == CellKind::ignored ? Acc(0) : e;
      slope[i] = kind == CellKind::ignored ? Acc(0) : g;
    }
    if (pass_.wants_sums) {
      if (num_positive == 0) {
        for (int i = 0; i < count; ++i) lanes.negative_conf[i] += error[i];
      } else {
        for (int i = 0; i < count; ++i) {
          const bool positive = cell_kind(rule_, confidence[i]) == CellKind::positive;
          lanes.positive_conf[i] += positive ? error[i] : Acc(0);
          lanes.negative_conf[i] += positive ? Acc(0) : error[i];
        }
        lanes.num_positive += num_positive;
      }
    }
    if (pass_.grad) store<kFull>(element<Pred>(pass_.grad, image, map, cell), slope, count);
    if (per_element_error_) store<kFull>(element<Acc>(pass_.errors, image, map, cell), error, count);
    if (per_cell_error_) memcpy(cell_error, error, count * sizeof(Acc));
    return num_positive > 0;
  }

  // One pose map of a block with a positive cell.
  template <bool kFull>
  inline void pose_block(int64_t image, int64_t map, int64_t cell, int left, Acc weight,
                         Acc coefficient, Acc* cell_error, Lanes& lanes) const {
    const int count = kFull ? kBlock : left;
    const int64_t last_map = pass_.grid.maps - 1;
    alignas(64) Acc confidence[kBlock], pred[kBlock], target[kBlock], error[kBlock], slope[kBlock],
        scale[kBlock];
    if (pass_.kinds_from_pred) {
      load<kFull>(element<const Pred>(pass_.pred, image, last_map, cell), count, confidence);
    } else {
      load<kFull>(element<const Target>(pass_.target, image, last_map, cell), count, confidence);
    }
    load<kFull>(element<const Pred>(pass_.pred, image, map, cell), count, pred);
    load<kFull>(element<const Target>(pass_.target, image, map, cell), count, target);
    if (per_cell_) {
      load<kFull>(element<const Acc>(pass_.grad_output, image, map, cell), count, scale);
    }
    for (int i = 0; i < count; ++i) {
      const bool positive = cell_kind(rule_, confidence[i]) == CellKind::positive;
      const Acc d = difference<Acc>(pred[i], target[i]);
      const Acc e = weighted_error(weight, d);
      const Acc g = gradient(per_cell_ ? coefficient * scale[i] : coefficient, d);
      error[i] = positive ? e : Acc(0);
      slope[i] = positive ? g : Acc(0);
    }
    if (pass_.wants_sums) {
      for (int i = 0; i < count; ++i) lanes.coord[i] += error[i];
    }
    if (pass_.grad) store<kFull>(element<Pred>(pass_.grad, image, map, cell), slope, count);
    if (per_element_error_) store<kFull>(element<Acc>(pass_.errors, image, map, cell), error, count);
    if (per_cell_error_) {
      for (int i = 0; i < count; ++i) cell_error[i] += error[i];
    }
  }

  template <bool kFull, typename T>
  static inline void load(const T* from, int count, Acc* to) {
    if constexpr (kFull) {
      load_block(from, to);
    } else {
      load_block(from, count, to);
    }
  }

  template <bool kFull, typename T>
  inline void store(T* to, const Acc* from, int count) const {
    if constexpr (kFull) {
      store_block(to, from, stream_);
    } else {
      for (int i = 0; i < count; ++i) to[i] = Convert<T>::from(from[i]);
    }
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
    Lanes lanes;
    for (int64_t at = chunk_begin; at < chunk_end;) {
      const int64_t image = at / grid.cells, begin = at % grid.cells;
      const int64_t left = chunk_end - at;
      const int64_t end = begin + left < grid.cells ? begin + left : grid.cells;
      if (plan.planar) {
        loops.planar(image, begin, end, lanes);
      } else {
        loops.strided(image, begin, end, lanes);
      }
      at += end - begin;
    }
    sums[chunk - first] = lanes.total();
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
