// The sum of weights in double, without a copy: torch.sum on the CPU converts the whole tensor
// before it sums it in another dtype.
#include <vector>

#include "fcrn_loss_cpu.h"
#include "parallel_for.h"

namespace fcrn::cpu {
namespace {

constexpr int64_t kPiece = 1 << 14;  // elements that one thread sums, for any number of threads
constexpr int kLanes = 16;

// Kahan summation for float64, without which the sum of equal weights would be off by more ulps
// than a gradient may be. Narrower types do not need it in double.
template <typename T>
double sum_of(const T* from, int64_t count) {
  double lanes[kLanes] = {}, lost[kLanes] = {};
  const auto add = [&](int lane, double value) {
    if constexpr (sizeof(T) < sizeof(double)) {
      lanes[lane] += value;
      return;
    }
    const double wanted = value - lost[lane];
    const double sum = lanes[lane] + wanted;
    lost[lane] = (sum - lanes[lane]) - wanted;
    lanes[lane] = sum;
  };
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    for (int i = 0; i < kLanes; ++i) add(i, Convert<double>::from(from[at + i]));
  }
  for (; at < count; ++at) add(0, Convert<double>::from(from[at]));
  for (int i = 1; i < kLanes; ++i) add(0, lanes[i]);
  return lanes[0];
}

template <typename T>
double sum_of_all(const T* from, int64_t count) {
  std::vector<double> sums((count + kPiece - 1) / kPiece);
  auto add = [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t left = count - piece * kPiece;
      sums[piece] = sum_of(from + piece * kPiece, left < kPiece ? left : kPiece);
    }
  };
  parallel_for(static_cast<int64_t>(sums.size()), 1, add);
  return sum_of(sums.data(), static_cast<int64_t>(sums.size()));
}

}  // namespace

double weight_sum(const void* weights, DType dtype, int64_t count) {
  return visit_element(dtype, [&](auto element) {
    return sum_of_all(static_cast<const decltype(element)*>(weights), count);
  });
}

}  // namespace fcrn::cpu
