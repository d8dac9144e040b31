// The sum of a caller's weights in double, in one read of them and without a copy: PyTorch's own
// sums on the CPU convert a tensor as a whole before they add it up in another type.
#include <vector>

#include "fcrn_loss_cpu.h"
#include "parallel_for.h"

namespace fcrn::cpu {
namespace {

constexpr int64_t kPiece = 1 << 14;  // elements that one thread adds up, whatever the threads
constexpr int kLanes = 16;

// Doubles are added up with what rounding lost so far (Kahan): without it equal weights would be
// off by more ulps than a gradient may be. The others have bits to spare.
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
  switch (dtype) {
    case DType::float64:
      return sum_of_all(static_cast<const double*>(weights), count);
    case DType::float32:
      return sum_of_all(static_cast<const float*>(weights), count);
    case DType::float16:
      return sum_of_all(static_cast<const Half*>(weights), count);
    case DType::bfloat16:
      return sum_of_all(static_cast<const BFloat16*>(weights), count);
    default:
      return sum_of_all(static_cast<const Bool*>(weights), count);
  }
}

}  // namespace fcrn::cpu
