// Runs the CPU's baseline loops over inputs made of whole numbers and prints sums and a hash of the
// gradient for each: the same program for any processor must print the same.
#define FCRN_INSTRUCTION_SET baseline
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/cell_loops.h"

namespace {

using namespace fcrn;

constexpr int kMaps = 7;

uint64_t hash(const void* data, size_t bytes) {
  uint64_t value = 14695981039346656037u;  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) {
    value = (value ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
  }
  return value;
}

template <typename Pred, typename Target>
void run(int images, int cells, float positives, bool planar, bool given) {
  const size_t elements = size_t(images) * kMaps * cells;
  std::vector<Pred> pred(elements), grad(elements);
  std::vector<Target> target(elements);
  std::mt19937 random(cells);  // the standard says which numbers it gives
  const auto uniform = [&] { return static_cast<float>(random() >> 8) / (1 << 24); };
  for (size_t i = 0; i < elements; ++i) {
    pred[i] = Convert<Pred>::from(2 * uniform() - 1);
    target[i] = Convert<Target>::from(uniform());
  }
  const int64_t map_stride = planar ? cells : 1, cell_stride = planar ? 1 : kMaps;
  for (int image = 0; image < images; ++image) {
    for (int cell = 0; cell < cells; ++cell) {
      const float kind = uniform();
      const float confidence = kind < positives ? 1 - kind / 2 : kind > 0.9f ? -1.0f : 0.0f;
      target[size_t(image) * kMaps * cells + (kMaps - 1) * map_stride + cell * cell_stride] =
          Convert<Target>::from(confidence);
    }
  }
  std::vector<float> weights(size_t(images) * cells);
  std::vector<uint8_t> are_positive(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i] = uniform() < 0.3f ? 0.0f : uniform();
    are_positive[i] = uniform() < positives;
  }

  int64_t num_positive = 0;
  LossPass pass;
  pass.grid.images = images;
  pass.grid.maps = kMaps;
  pass.grid.cells = pass.grid.sizes[0] = cells;
  TensorView view;
  view.image_stride = int64_t{kMaps} * cells;
  view.map_stride = map_stride;
  view.cell_strides[0] = cell_stride;
  pass.pred = pass.target = pass.grad = view;
  pass.pred.dtype = pass.grad.dtype = DTypeOf<Pred>::value;
  pass.target.dtype = DTypeOf<Target>::value;
  pass.pred.data = pred.data();
  pass.target.data = target.data();
  pass.grad.data = grad.data();
  pass.kinds = pass.target;
  pass.kinds.data = target.data() + (kMaps - 1) * map_stride;
  if (given) {
    pass.weight.image_stride = cells;
    pass.weight.cell_strides[0] = 1;
    pass.positive = pass.weight;
    pass.weight.data = weights.data();
    pass.positive.data = are_positive.data();
    pass.positive.dtype = DType::boolean;
  }
  pass.divisor = static_cast<double>(elements);
  pass.num_positive = &num_positive;
  pass.negative_weight.number = 0.01;
  pass.coord_weights.numbers[0] = 1.7;
  pass.ignore_value = -1.0;

  const cpu::ChunkPlan plan{pass, planar, false};
  const int64_t chunks = (int64_t{images} * cells + cpu::kChunkCells - 1) / cpu::kChunkCells;
  std::vector<Sums> chunk_sums(chunks);
  cpu::baseline::run_chunks(plan, 0, chunks, chunk_sums.data());
  Sums sums;
  for (const Sums& chunk : chunk_sums) sums.add(chunk);
  std::printf("%d %d %g %d %d %d %d: %a %a %a %lld %016llx\n", static_cast<int>(pass.pred.dtype),
              static_cast<int>(pass.target.dtype), positives, planar, given, images, cells,
              sums.coord, sums.positive_conf, sums.negative_conf,
              static_cast<long long>(sums.num_positive),
              static_cast<unsigned long long>(hash(grad.data(), elements * sizeof(Pred))));
}

template <typename Pred, typename Target>
void run_all() {
  for (int cells : {1, 15, 16, 17, 169, 256, 5000}) {
    for (float positives : {0.0f, 0.02f, 1.0f}) {
      for (bool planar : {true, false}) {
        for (bool given : {true, false}) run<Pred, Target>(3, cells, positives, planar, given);
      }
    }
  }
}

}  // namespace

int main() {
  run_all<float, float>();
  run_all<double, float>();
  run_all<float, double>();
  run_all<double, double>();
  run_all<BFloat16, BFloat16>();
  run_all<BFloat16, float>();
  run_all<Half, Half>();
  run_all<Half, float>();
  run_all<Half, double>();
}
