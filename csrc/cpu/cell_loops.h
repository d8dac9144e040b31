// The loops over the cells of a chunk, with the arithmetic of cell_loss.h. They are compiled once
// for each instruction set, whose namespace FCRN_INSTRUCTION_SET names.
//
// Cells are processed in blocks of 16, one cache line of float32. The pose maps of a block are read
// only if the pose of one of its cells counts. Errors are summed in 16 lanes, up to 8 blocks in the
// type of the arithmetic and then in double; the lanes are added in a fixed order at the end.
//
// Results are collected in a row, one map of a chunk, which stays in the L1 cache, and then written
// at once. Only the list of blocks to process depends on where the positive cells are.
#pragma once

#include <cstring>
#include <type_traits>

#include "fcrn_loss_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fcrn::cpu::FCRN_INSTRUCTION_SET {
namespace {  // NOLINT(*-anonymous-namespace-in-header,cert-dcl59-cpp): see above

constexpr int kBlock = 16;
constexpr int kChunkBlocks = kChunkCells / kBlock;
constexpr int kBlocksBetweenFlushes = 8;
constexpr int kBlocksAhead = 16;  // to prefetch

// ---- vectors ------------------------------------------------------------------------------------

#if defined(FCRN_AVX2)
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
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t UpperBits __attribute__((vector_size(kVectorBytes / 2)));

template <typename Acc>
inline Vector<Acc> splat(Acc value) {
  return Vector<Acc>{} + value;
}

template <typename Acc>
inline ElementWeight<Vector<Acc>> splat(const ElementWeight<Acc>& weight) {
  return {splat(weight.weight), splat(weight.coefficient)};
}

template <typename Acc>
inline PassConstants<Vector<Acc>> splat(const PassConstants<Acc>& constants) {
  return {constants.dloss_derror, splat(constants.ignore_value), splat(constants.negative),
          splat(constants.positive)};
}

// The mask of the lanes that are among the first `size` cells of a block; the vector is at `lane`.
template <typename Acc>
inline auto is_inside(int lane, int size) {
  Vector<Acc> lanes;
  for (int i = 0; i < kLanes<Acc>; ++i) lanes[i] = static_cast<Acc>(i);
  return lanes < splat(static_cast<Acc>(size - lane));
}

// A mask as bits, one for each lane.
template <typename Mask>
inline uint32_t bits_of(Mask mask) {
#if defined(FCRN_AVX2)
  if constexpr (sizeof(mask[0]) == 4) {
    return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
  } else {
    return _mm256_movemask_pd(reinterpret_cast<__m256d>(mask));
  }
#else
  uint32_t bits = 0;
  for (unsigned i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

// ---- memory -------------------------------------------------------------------------------------

// Loads a vector and converts it to the type of the arithmetic. The most frequent conversions use
// intrinsics, because GCC does not vectorise scalar ones that are inlined into the loops.
template <typename Acc, typename T>
inline Vector<Acc> load(const T* from) {
  constexpr bool is_float = DTypeOf<Acc>::value == DType::float32;
  Vector<Acc> values;
  if constexpr (DTypeOf<T>::value == DTypeOf<Acc>::value) {
    memcpy(&values, from, sizeof(values));
  } else if constexpr (is_float && DTypeOf<T>::value == DType::bfloat16) {
#if defined(FCRN_AVX2)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    values = reinterpret_cast<Vector<Acc>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
    UpperBits bits;
    memcpy(&bits, from, sizeof(bits));
    values = reinterpret_cast<Vector<Acc>>(__builtin_convertvector(bits, FloatBits) << 16);
#endif
#if defined(FCRN_AVX2)
  } else if constexpr (is_float && DTypeOf<T>::value == DType::float16) {
    values = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  } else if constexpr (is_float && DTypeOf<T>::value == DType::boolean) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#endif
  } else {
    for (int i = 0; i < kLanes<Acc>; ++i) values[i] = Convert<Acc>::from(from[i]);
  }
  return values;
}

template <typename Acc, typename T>
inline void store(T* to, Vector<Acc> values) {
  constexpr bool is_float = DTypeOf<Acc>::value == DType::float32;
  if constexpr (DTypeOf<T>::value == DTypeOf<Acc>::value) {
    memcpy(to, &values, sizeof(values));
  } else if constexpr (is_float && DTypeOf<T>::value == DType::bfloat16) {
    const auto is_nan = values != values;  // NOLINT(misc-redundant-expression)
    const auto rounded = bfloat16_bits(reinterpret_cast<FloatBits>(values), is_nan);
    const auto bits = __builtin_convertvector(rounded, UpperBits);
    memcpy(to, &bits, sizeof(bits));
#if defined(FCRN_AVX2)
  } else if constexpr (is_float && DTypeOf<T>::value == DType::float16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int i = 0; i < kLanes<Acc>; ++i) to[i] = Convert<T>::from(values[i]);
  }
}

// The cells of a block: in place if it is a whole one, else in `padded`, followed by zeros.
template <typename T>
inline const T* block_of(const T* from, int size, T (&padded)[kBlock]) {
  if (size == kBlock) return from;
  memcpy(padded, from, size * sizeof(T));
  memset(padded + size, 0, (kBlock - size) * sizeof(T));
  return padded;
}

#if defined(__x86_64__)
// Writes a cache line, bypassing the caches.
inline void stream_line(char* to, const char* from) {
#if defined(FCRN_AVX2)
  for (int i = 0; i < 64; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
#else
  for (int i = 0; i < 64; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#endif
}
#endif

// Copies a row to its place, bypassing the caches if `stream`.
inline void store_row(void* to, const void* row, int64_t bytes, [[maybe_unused]] bool stream) {
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(row);
#if defined(__x86_64__)
  constexpr int64_t kLine = 64;
  if (stream) {
    const int64_t to_line = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
    const int64_t head = to_line < bytes ? to_line : bytes;
    memcpy(out, in, head);
    for (out += head, in += head, bytes -= head; bytes >= kLine;
         out += kLine, in += kLine, bytes -= kLine) {
      stream_line(out, in);
    }
  }
#endif
  memcpy(out, in, bytes);
}

// ---- sums ---------------------------------------------------------------------------------------

// The sums of a few blocks, by lane.
template <typename Acc>
using BlockErrors = Vector<Acc>[kBlock / kLanes<Acc>];

// The sums of a chunk, by lane.
struct LaneSums {
  alignas(64) double lanes[kBlock] = {};

  template <typename V, size_t kVectors>
  void add_and_clear(V (&errors)[kVectors]) {
    alignas(64) decltype(errors[0][0] + 0) recent[kBlock];
    memcpy(recent, errors, sizeof(recent));
    for (int i = 0; i < kBlock; ++i) lanes[i] += recent[i];
    memset(errors, 0, sizeof(errors));
  }

  double total() {
    for (int width = kBlock / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
  }
};

struct CellSums {
  LaneSums coord, positive_conf, negative_conf;
  int64_t num_positive = 0;
};

// ---- the loops ----------------------------------------------------------------------------------

// The loops for one combination of dtypes. kGeneral is false if the kinds follow from the
// confidence and there is no tensor of weights; these loops are faster by half.
template <typename Acc, typename Pred, typename Target, bool kGeneral>
class Loops {
  class ConfidenceBlocks;

 public:
  explicit Loops(const ChunkPlan& plan)
      : pass_(plan.pass),
        constants_(plan.pass.constants<Acc>()),
        per_cell_(plan.pass.has_grad_output_per_cell()),
        per_cell_error_(plan.pass.errors && plan.pass.output == Output::cell),
        per_element_error_(plan.pass.errors && plan.pass.output == Output::element),
        weight_is_per_cell_(plan.pass.weight && plan.pass.weight.map_stride == 0),
        grad_is_interleaved_(plan.pass.grad && plan.pass.grad.is_interleaved(plan.pass.grid)),
        stream_(plan.stream) {}

  // Cells [begin, end) of an image, if all tensors are planar: the confidences, then map by map.
  void planar(int64_t image, int64_t begin, int64_t end, CellSums& sums) const {
    const int64_t count = end - begin, pose_maps = pass_.num_pose_maps();
    ChunkBuffers buffers;
    if (kGeneral && pass_.positive) {
      buffers.positives =
          row_of(pass_.positive, 1, image, begin, count, buffers.converted_positives);
    }
    if (kGeneral && weight_is_per_cell_) {
      buffers.weights =
          row_of(pass_.weight, pass_.weight_repeat, image, begin, count, buffers.converted_weights);
    }
    if (has_kinds()) {
      confidences(image, begin, count, buffers, sums);
      store_rows(image, pose_maps, begin, count, buffers);
    } else {
      list_blocks(count, buffers);
    }
    // Blocks whose pose is masked stay zero; each map overwrites the others.
    memset(buffers.grads, 0, count * sizeof(Pred));
    if (per_element_error_) memset(buffers.errors, 0, count * sizeof(Acc));
    for (int64_t map = 0; map < pose_maps; ++map) {
      pose_map(image, map, begin, count, buffers, sums);
      store_rows(image, map, begin, count, buffers);
    }
    if (per_cell_error_) {
      const auto divisor = static_cast<Acc>(pass_.divisor);
      for (int64_t i = 0; i < count; ++i) buffers.cell_errors[i] /= divisor;
      store_row(place<Acc>(pass_.errors, image, 0, begin), buffers.cell_errors, count * sizeof(Acc),
                stream_);
    }
  }

  // Cells [begin, end) of an image, for any strides: confidences by block, poses by cell.
  void strided(int64_t image, int64_t begin, int64_t end, CellSums& sums) const {
    ConfidenceBlocks blocks(*this);
    for (int64_t cell = begin; cell < end; cell += kBlock) {
      strided_block(image, cell, block_size(end - cell), blocks, sums);
    }
    blocks.flush(sums);
  }

 private:
  template <typename T>
  static T* place(const TensorView& view, int64_t image, int64_t map, int64_t cell) {
    return static_cast<T*>(view.data) + image * view.image_stride + map * view.map_stride + cell;
  }

  template <typename T>
  T* at(const TensorView& view, int64_t image, int64_t cell) const {
    return view ? static_cast<T*>(view.data) + view.cell_offset(pass_.grid, image, cell) : nullptr;
  }

  bool has_kinds() const { return !kGeneral || pass_.has_kinds; }

  ElementWeight<Acc> pose_weight(int64_t map) const {
    return ElementWeight<Acc>::of(pass_.coord_weights.value(map), constants_.dloss_derror);
  }

  // The blocks of a chunk whose pose counts, its `weight` and `positive`, and a row of results.
  struct ChunkBuffers {
    int num_pose_blocks = 0;
    int pose_blocks[kChunkBlocks];  // their first cells, relative to the chunk's
    const Acc* weights;             // if they are the same for all maps
    const Acc* positives;           // 1 or 0
    alignas(64) Acc converted_weights[kChunkCells], converted_positives[kChunkCells];
    alignas(64) Pred grads[kChunkCells];
    alignas(64) Acc errors[kChunkCells];
    alignas(64) Acc cell_errors[kChunkCells];  // summed over the maps
  };

  // Converts `size` cells of `weight` or `positive` and fills the rest of the block with zeros.
  template <typename T>
  static void convert(const T* from, int64_t stride, int size, Acc* to) {
    if (stride == 1 && size == kBlock) {
      for (int i = 0; i < kBlock; i += kLanes<Acc>) store<Acc>(to + i, load<Acc>(from + i));
      return;
    }
    for (int i = 0; i < size; ++i) to[i] = Convert<Acc>::from(from[i * stride]);
    for (int i = size; i < kBlock; ++i) to[i] = 0;
  }

  static void convert_block(const TensorView& view, int64_t image, int64_t map, int64_t cell,
                            int size, Acc* to) {
    const int64_t stride = view.cell_strides[0];
    const int64_t first = image * view.image_stride + map * view.map_stride + cell * stride;
    visit_element(view.dtype, [&](auto element) {
      convert(static_cast<const decltype(element)*>(view.data) + first, stride, size, to);
    });
  }

  // A row of `weight` or `positive`, in place or converted into `row`.
  static const Acc* row_of(const TensorView& view, int64_t repeat, int64_t image, int64_t begin,
                           int64_t count, Acc* row) {
    const int64_t stride = view.cell_strides[0];
    if (repeat == 1 && stride != 0) {
      if (view.dtype == DTypeOf<Acc>::value && stride == 1 && count % kBlock == 0) {
        return place<const Acc>(view, image, 0, begin);
      }
      for (int64_t at = 0; at < count; at += kBlock) {
        convert_block(view, image, 0, begin + at, block_size(count - at), row + at);
      }
      return row;
    }
    for (int64_t at = 0; at < count;) {
      const int64_t index = stride == 0 ? 0 : (begin + at) / repeat;
      const int64_t left = stride == 0 ? count : (index + 1) * repeat - begin;
      const int64_t end = left < count ? left : count;
      const Acc value =
          load_as<Acc>(view.data, view.dtype, image * view.image_stride + index * stride);
      for (; at + kLanes<Acc> <= end; at += kLanes<Acc>) store<Acc>(row + at, splat(value));
      while (at < end) row[at++] = value;
    }
    for (int64_t at = count; at % kBlock != 0; ++at) row[at] = 0;
    return row;
  }

  // The tensor `weight` in a block, `at` cells after the chunk's first, `begin`; null if absent.
  const Acc* weights(int64_t image, int64_t map, int64_t begin, int64_t at, int size,
                     const ChunkBuffers& buffers, Acc (&converted)[kBlock]) const {
    if (!kGeneral || !pass_.weight) return nullptr;
    if (weight_is_per_cell_) return buffers.weights + at;
    if (pass_.weight.dtype == DTypeOf<Acc>::value && pass_.weight.cell_strides[0] == 1 &&
        size == kBlock) {
      return place<const Acc>(pass_.weight, image, map, begin + at);
    }
    convert_block(pass_.weight, image, map, begin + at, size, converted);
    return converted;
  }

  // The tensor `positive` in a block; null if absent.
  const Acc* positives(const ChunkBuffers& buffers, int64_t at) const {
    return kGeneral && pass_.positive ? buffers.positives + at : nullptr;
  }

  // The kinds of the cells of a vector.
  template <typename V>
  static auto kinds_of(const PassConstants<V>& constants, const Target* confidences,
                       const Acc* positives) {
    const V confidence = load<Acc>(confidences);
    if (kGeneral && positives) return kind_of(constants, confidence, load<Acc>(positives) != V{});
    return kind_of(constants, confidence);
  }

  static int block_size(int64_t left) { return left < kBlock ? static_cast<int>(left) : kBlock; }

  // Computes blocks of confidences and sums their errors by kind.
  class ConfidenceBlocks {
    using V = Vector<Acc>;

   public:
    explicit ConfidenceBlocks(const Loops& loops)
        : constants_(splat(loops.constants_)), weight_is_per_cell_(loops.weight_is_per_cell_) {}

    // Writes the gradients and, if wanted, the errors of the first `size` cells of a block. Returns
    // the cells whose pose counts, as bits. `scale`, if not null, is grad_output by cell.
    uint32_t compute(const Pred* pred, const Target* target, const Target* kinds,
                     const Acc* positives, const Acc* weights, const Acc* scale, int size,
                     Pred* grads, Acc* errors, CellSums& sums) {
      uint32_t positive_cells = 0, pose_cells = 0;
      for (int i = 0; i < kBlock; i += kLanes<Acc>) {
        const auto kind = kinds_of(constants_, kinds + i, positives ? positives + i : nullptr);
        auto counted = kind.counted & is_inside<Acc>(i, size);
        auto weight = confidence_weight(constants_, kind);
        if (scale) weight.coefficient *= load<Acc>(scale + i);
        if (kGeneral && weights) apply_weight(load<Acc>(weights + i), weight, counted);
        const auto [error, grad] =
            element(counted, weight, load<Acc>(pred + i) - load<Acc>(target + i));
        store<Acc>(grads + i, grad);
        if (errors) store<Acc>(errors + i, error);
        positive_errors_[i / kLanes<Acc>] += kind.positive ? error : V{};
        negative_errors_[i / kLanes<Acc>] += kind.positive ? V{} : error;
        const uint32_t positive = bits_of(kind.positive & counted) << i;
        positive_cells |= positive;
        pose_cells |=
            kGeneral && weights && !weight_is_per_cell_ ? bits_of(kind.positive) << i : positive;
      }
      sums.num_positive += __builtin_popcount(positive_cells);
      if (++num_blocks_ % kBlocksBetweenFlushes == 0) flush(sums);
      return pose_cells;
    }

    void flush(CellSums& sums) {
      sums.positive_conf.add_and_clear(positive_errors_);
      sums.negative_conf.add_and_clear(negative_errors_);
    }

   private:
    const PassConstants<V> constants_;
    const bool weight_is_per_cell_;
    BlockErrors<Acc> positive_errors_ = {}, negative_errors_ = {};
    int num_blocks_ = 0;
  };

  // Without kinds: lists the blocks that have an element whose weight is not 0.
  void list_blocks(int64_t count, ChunkBuffers& buffers) const {
    for (int64_t at = 0; at < count; at += kBlock) {
      uint32_t counted = weight_is_per_cell_ ? 0 : 1;
      for (int i = 0; weight_is_per_cell_ && i < kBlock; i += kLanes<Acc>) {
        counted |= bits_of(load<Acc>(buffers.weights + at + i) != Vector<Acc>{});
      }
      buffers.pose_blocks[buffers.num_pose_blocks] = static_cast<int>(at);
      buffers.num_pose_blocks += counted != 0;
    }
  }

  // Computes the confidences of `count` cells and lists the blocks that have a positive cell.
  void confidences(int64_t image, int64_t begin, int64_t count, ChunkBuffers& buffers,
                   CellSums& sums) const {
    const int64_t map = pass_.grid.maps - 1;
    const Pred* preds = place<const Pred>(pass_.pred, image, map, begin);
    const Target* targets = place<const Target>(pass_.target, image, map, begin);
    const Target* kinds = place<const Target>(pass_.kinds, image, 0, begin);
    Acc* errors = per_element_error_ ? buffers.errors
                  : per_cell_error_  ? buffers.cell_errors
                                     : nullptr;
    Pred padded_pred[kBlock];
    Target padded_target[kBlock], padded_kinds[kBlock];
    Acc padded_scale[kBlock], converted_weights[kBlock];
    ConfidenceBlocks blocks(*this);
    for (int64_t at = 0; at < count; at += kBlock) {
      const int size = block_size(count - at);
      const uint32_t pose_cells = blocks.compute(
          block_of(preds + at, size, padded_pred), block_of(targets + at, size, padded_target),
          block_of(kinds + at, size, padded_kinds), positives(buffers, at),
          weights(image, map, begin, at, size, buffers, converted_weights),
          scales(image, map, begin + at, size, padded_scale), size, buffers.grads + at,
          errors ? errors + at : nullptr, sums);
      buffers.pose_blocks[buffers.num_pose_blocks] = static_cast<int>(at);
      buffers.num_pose_blocks += pose_cells != 0;
    }
    blocks.flush(sums);
  }

  // Prefetches a block a few further on, in this map or in the next. Always inlined, because GCC 12
  // drops a call that does nothing but prefetch.
  __attribute__((always_inline)) void prefetch(const ChunkBuffers& buffers, int block,
                                               const Pred* preds, const Target* targets) const {
    const int ahead = block + kBlocksAhead, beyond = ahead - buffers.num_pose_blocks;
    const bool in_next_map = beyond >= 0;
    const int in_next = beyond < block ? beyond : block;
    const int at = buffers.pose_blocks[in_next_map ? in_next : ahead];
    __builtin_prefetch(preds + at + (in_next_map ? pass_.pred.map_stride : 0));
    __builtin_prefetch(targets + at + (in_next_map ? pass_.target.map_stride : 0));
  }

  // Computes one pose map of the listed blocks.
  void pose_map(int64_t image, int64_t map, int64_t begin, int64_t count, ChunkBuffers& buffers,
                CellSums& sums) const {
    using V = Vector<Acc>;
    const ElementWeight<V> weight = splat(pose_weight(map));
    const PassConstants<V> constants = splat(constants_);
    const Pred* preds = place<const Pred>(pass_.pred, image, map, begin);
    const Target* targets = place<const Target>(pass_.target, image, map, begin);
    const Target* all_kinds =
        has_kinds() ? place<const Target>(pass_.kinds, image, 0, begin) : nullptr;
    Pred padded_pred[kBlock];
    Target padded_target[kBlock], padded_kinds[kBlock];
    Acc padded_scale[kBlock], converted_weights[kBlock];
    BlockErrors<Acc> errors = {};
    const bool by_kind = has_kinds(), weighted = kGeneral && pass_.weight;
    // kPlain: the block is a whole one, no errors are written, and grad_output does not differ from
    // cell to cell. Testing for these in each vector would cost a third of the time.
    const auto compute = [&](auto plain, int64_t at, int size) {
      constexpr bool kPlain = decltype(plain)::value;
      const Pred* pred = kPlain ? preds + at : block_of(preds + at, size, padded_pred);
      const Target* target = kPlain ? targets + at : block_of(targets + at, size, padded_target);
      const Target* kinds = !by_kind ? nullptr
                            : kPlain ? all_kinds + at
                                     : block_of(all_kinds + at, size, padded_kinds);
      const Acc* positive = by_kind ? positives(buffers, at) : nullptr;
      const Acc* given =
          weighted ? weights(image, map, begin, at, size, buffers, converted_weights) : nullptr;
      const Acc* scale = kPlain ? nullptr : scales(image, map, begin + at, size, padded_scale);
      for (int i = 0; i < kBlock; i += kLanes<Acc>) {
        decltype(V{} < V{}) counted;
        if (by_kind) {
          counted = kinds_of(constants, kinds + i, positive ? positive + i : nullptr).positive;
        } else {
          counted = kPlain ? V{} == V{} : is_inside<Acc>(i, size);
        }
        ElementWeight<V> scaled = weight;
        if (!kPlain && scale) scaled.coefficient *= load<Acc>(scale + i);
        if (weighted) apply_weight(load<Acc>(given + i), scaled, counted);
        const auto [error, grad] =
            element(counted, scaled, load<Acc>(pred + i) - load<Acc>(target + i));
        store<Acc>(buffers.grads + at + i, grad);
        errors[i / kLanes<Acc>] += error;
        if (!kPlain && per_element_error_) store<Acc>(buffers.errors + at + i, error);
        if (!kPlain && per_cell_error_) {
          Acc* sum = buffers.cell_errors + at + i;
          store<Acc>(sum, load<Acc>(sum) + error);
        }
      }
    };
    const bool is_plain = !per_cell_ && !per_element_error_ && !per_cell_error_;
    const int num_blocks = buffers.num_pose_blocks;
    for (int block = 0; block < num_blocks; ++block) {
      prefetch(buffers, block, preds, targets);
      const int64_t at = buffers.pose_blocks[block];
      const int size = block_size(count - at);
      if (is_plain && size == kBlock) {
        compute(std::true_type{}, at, kBlock);
      } else {
        compute(std::false_type{}, at, size);
      }
      if ((block + 1) % kBlocksBetweenFlushes == 0 || block + 1 == num_blocks) {
        sums.coord.add_and_clear(errors);
      }
    }
  }

  void store_rows(int64_t image, int64_t map, int64_t begin, int64_t count,
                  const ChunkBuffers& buffers) const {
    if (per_element_error_) {
      store_row(place<Acc>(pass_.errors, image, map, begin), buffers.errors, count * sizeof(Acc),
                stream_);
    }
    if (!pass_.grad) return;
    Pred* grads = place<Pred>(pass_.grad, image, map, begin);
    if (!pass_.grad_is_for_one || map >= pass_.num_pose_maps()) {
      store_row(grads, buffers.grads, count * sizeof(Pred), stream_);
      return;
    }
    for (int block = 0; block < buffers.num_pose_blocks; ++block) {
      const int64_t at = buffers.pose_blocks[block];
      memcpy(grads + at, buffers.grads + at, block_size(count - at) * sizeof(Pred));
    }
  }

  // grad_output in a block, if it differs from cell to cell; else null.
  const Acc* scales(int64_t image, int64_t map, int64_t cell, int size,
                    Acc (&padded)[kBlock]) const {
    if (!per_cell_) return nullptr;
    return block_of(place<const Acc>(pass_.grad_output, image, map, cell), size, padded);
  }

  // Multiplies by an element of the tensor `weight`, given the cell's number in its image.
  void apply_strided_weight(int64_t image, int64_t cell, int64_t map, ElementWeight<Acc>& weight,
                            bool& counted) const {
    const TensorView& view = pass_.weight;
    const int64_t index = pass_.weight_offset(image, cell) + map * view.map_stride;
    apply_weight(load_as<Acc>(view.data, view.dtype, index), weight, counted);
  }

  // Computes the confidences of `size` cells from `cell` on, for any strides. Returns the cells
  // whose pose counts, as bits.
  uint32_t strided_confidences(int64_t image, int64_t cell, int size, Pred (&grads)[kBlock],
                               Acc (&errors)[kBlock], ConfidenceBlocks& confidences,
                               CellSums& sums) const {
    const int64_t map = pass_.grid.maps - 1;
    Pred preds[kBlock] = {};
    Target targets[kBlock] = {}, kinds[kBlock] = {};
    Acc scale[kBlock] = {}, positives[kBlock] = {}, weights[kBlock] = {};
    const auto element_of = [&](const TensorView& view, int64_t of_cell) {
      const int64_t index = view.cell_offset(pass_.grid, image, of_cell) + map * view.map_stride;
      return load_as<Acc>(view.data, view.dtype, index);
    };
    for (int i = 0; i < size; ++i) {
      preds[i] = at<Pred>(pass_.pred, image, cell + i)[map * pass_.pred.map_stride];
      targets[i] = at<Target>(pass_.target, image, cell + i)[map * pass_.target.map_stride];
      kinds[i] = *at<Target>(pass_.kinds, image, cell + i);
      if (per_cell_) scale[i] = element_of(pass_.grad_output, cell + i);
      if (kGeneral && pass_.positive) positives[i] = element_of(pass_.positive, cell + i);
      if (kGeneral && pass_.weight) weights[i] = element_of(pass_.weight, cell + i);
    }
    return confidences.compute(preds, targets, kinds, pass_.positive ? positives : nullptr,
                               pass_.weight ? weights : nullptr, per_cell_ ? scale : nullptr, size,
                               grads, errors, sums);
  }

  // Computes `size` cells from `cell` on, for any strides.
  void strided_block(int64_t image, int64_t cell, int size, ConfidenceBlocks& confidences,
                     CellSums& sums) const {
    const int64_t maps = pass_.grid.maps, pose_maps = pass_.num_pose_maps();
    Pred grads[kBlock];
    Acc errors[kBlock] = {};
    uint32_t pose_cells = ~0u;
    if (has_kinds()) {
      pose_cells = strided_confidences(image, cell, size, grads, errors, confidences, sums);
    }
    bool write_zeros = !pass_.grad_is_for_one;
    if (write_zeros && grad_is_interleaved_) {
      memset(at<Pred>(pass_.grad, image, cell), 0, size * maps * sizeof(Pred));
      write_zeros = false;
    }
    for (int i = 0; i < size; ++i) {
      Pred* grad = at<Pred>(pass_.grad, image, cell + i);
      Acc* error = at<Acc>(pass_.errors, image, cell + i);
      double pose_error = 0;
      if (pose_cells >> i & 1u) {
        pose_error = strided_pose(image, cell + i, grad, error);
        sums.coord.lanes[i] += pose_error;
      } else {
        if (grad && write_zeros) {
          for (int64_t map = 0; map < pose_maps; ++map) grad[map * pass_.grad.map_stride] = Pred{};
        }
        if (per_element_error_) {
          for (int64_t map = 0; map < pose_maps; ++map) error[map * pass_.errors.map_stride] = 0;
        }
      }
      if (has_kinds()) {
        if (grad) grad[pose_maps * pass_.grad.map_stride] = grads[i];
        if (per_element_error_) error[pose_maps * pass_.errors.map_stride] = errors[i];
      }
      if (per_cell_error_) *error = static_cast<Acc>((pose_error + errors[i]) / pass_.divisor);
    }
  }

  // Computes the pose of a cell. Returns the sum of its errors.
  double strided_pose(int64_t image, int64_t cell, Pred* grad, Acc* errors) const {
    const Pred* pred = at<Pred>(pass_.pred, image, cell);
    const Target* target = at<Target>(pass_.target, image, cell);
    const Acc* scale = per_cell_ ? at<Acc>(pass_.grad_output, image, cell) : nullptr;
    double sum = 0;
    for (int64_t map = 0; map < pass_.num_pose_maps(); ++map) {
      bool counted = true;
      ElementWeight<Acc> weight = pose_weight(map);
      if (scale) weight.coefficient *= scale[map * pass_.grad_output.map_stride];
      if (kGeneral && pass_.weight) apply_strided_weight(image, cell, map, weight, counted);
      const Acc difference = Convert<Acc>::from(pred[map * pass_.pred.map_stride]) -
                             Convert<Acc>::from(target[map * pass_.target.map_stride]);
      const auto [error, gradient] = element(counted, weight, difference);
      sum += error;
      if (grad) grad[map * pass_.grad.map_stride] = Convert<Pred>::from(gradient);
      if (per_element_error_) errors[map * pass_.errors.map_stride] = error;
    }
    return sum;
  }

  const LossPass pass_;
  const PassConstants<Acc> constants_;
  const bool per_cell_;            // grad_output differs from cell to cell
  const bool per_cell_error_;      // reduction "cell"
  const bool per_element_error_;   // reduction "none"
  const bool weight_is_per_cell_;  // the tensor `weight` is the same for all maps
  const bool grad_is_interleaved_;
  const bool stream_;
};

template <typename Acc, typename Pred, typename Target, bool kGeneral>
void run_loops(const ChunkPlan& plan, int64_t first, int64_t last, Sums* sums) {
  const Loops<Acc, Pred, Target, kGeneral> loops(plan);
  const Grid& grid = plan.pass.grid;
  const int64_t all_cells = grid.images * grid.cells;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t chunk_begin = chunk * kChunkCells;
    const int64_t chunk_end =
        chunk_begin + kChunkCells < all_cells ? chunk_begin + kChunkCells : all_cells;
    CellSums sums_of_chunk;
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

// The pairs of dtypes of usual training. The others have only general loops, to save code size.
template <typename Pred, typename Target>
constexpr bool is_common = DTypeOf<Pred>::value == DTypeOf<Target>::value ||
                           (DTypeOf<Target>::value == DType::float32 && sizeof(Pred) == 2);

}  // namespace

// NOLINTNEXTLINE(misc-definitions-in-headers): compiled once for each instruction set
void run_chunks(const ChunkPlan& plan, int64_t first, int64_t last, Sums* sums) {
  visit_floating(plan.pass.pred.dtype, [&](auto pred) {
    visit_floating(plan.pass.target.dtype, [&](auto target) {
      using Pred = decltype(pred);
      using Target = decltype(target);
      using Acc = std::conditional_t<sizeof(Pred) == 8 || sizeof(Target) == 8, double, float>;
      if constexpr (is_common<Pred, Target>) {
        if (plan.pass.is_plain()) {
          return run_loops<Acc, Pred, Target, false>(plan, first, last, sums);
        }
      }
      run_loops<Acc, Pred, Target, true>(plan, first, last, sums);
    });
  });
}

}  // namespace fcrn::cpu::FCRN_INSTRUCTION_SET
