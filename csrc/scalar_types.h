// The element types of the tensors: float64, float32, float16 and bfloat16 as bit patterns, and
// bool. Conversions round to nearest, ties to even, on the host and on the device.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FCRN_HD __host__ __device__ __forceinline__
#else
// Always inlined: the CPU loops are compiled once for each instruction set, and the linker must not
// share a copy of these functions that holds instructions which the machine lacks.
#define FCRN_HD inline __attribute__((always_inline))
#endif

namespace fcrn {

enum class DType : int32_t { float64, float32, float16, bfloat16, boolean };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

struct Bool {
  uint8_t value;
};

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<double> : std::integral_constant<DType, DType::float64> {};
template <>
struct DTypeOf<float> : std::integral_constant<DType, DType::float32> {};
template <>
struct DTypeOf<Half> : std::integral_constant<DType, DType::float16> {};
template <>
struct DTypeOf<BFloat16> : std::integral_constant<DType, DType::bfloat16> {};
template <>
struct DTypeOf<Bool> : std::integral_constant<DType, DType::boolean> {};

FCRN_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

FCRN_HD uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FCRN_HD float to_float(float value) { return value; }
FCRN_HD float to_float(Bool value) { return value.value; }
FCRN_HD float to_float(BFloat16 value) { return float_from_bits(uint32_t{value.bits} << 16); }
FCRN_HD float to_float(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // Multiplying by 2^112 moves the exponent from bias 15 to bias 127; it is exact and normalises
  // subnormal halves too. Infinity and NaN then get their exponent.
  const uint32_t sign = (uint32_t{value.bits} & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t{value.bits} & 0x7fffu) << 13;
  const float scaled = float_from_bits(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_from_bits(bits_from_float(scaled) | special | sign);
#endif
}

// Conversions between the type of the arithmetic and those of elements.
template <typename To>
struct Convert;

template <>
struct Convert<double> {
  FCRN_HD static double from(double value) { return value; }
  template <typename From>
  FCRN_HD static double from(From value) {
    return to_float(value);
  }
};

template <>
struct Convert<float> {
  FCRN_HD static float from(double value) { return static_cast<float>(value); }
  template <typename From>
  FCRN_HD static float from(From value) {
    return to_float(value);
  }
};

template <>
struct Convert<Half> {
  FCRN_HD static Half from(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = bits_from_float(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal halves: rebias the exponent and add just under half an ulp, or half if odd.
    const uint32_t odd = (magnitude >> 13) & 1u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
    // Subnormal halves: adding 0.5 makes the hardware round to multiples of 2^-24.
    const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    // Infinity from 65520 on; NaN keeps its upper bits and becomes quiet.
    const uint32_t special =
        magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x3ffu)) : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t half = magnitude >= 0x477ff000u ? special : finite;
    return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
#endif
  }
  // Through a float that is rounded to odd, which does not round twice.
  FCRN_HD static Half from(double value);
};

// The bits of a float, rounded to those of a bfloat16; NaN keeps its upper bits and becomes quiet.
// `Bits` is uint32_t or, in the CPU loops, a vector of it.
template <typename Bits, typename Mask>
FCRN_HD Bits bfloat16_bits(Bits bits, Mask is_nan) {
  return (is_nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <>
struct Convert<BFloat16> {
  FCRN_HD static BFloat16 from(float value) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    return {static_cast<uint16_t>(bfloat16_bits(bits_from_float(value), value != value))};
#endif
  }
  FCRN_HD static BFloat16 from(double value);
};

// A double rounded to float; if inexact, to the neighbour whose last bit is odd. Rounding that to a
// half type gives the same as rounding the double.
FCRN_HD float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double error = value - static_cast<double>(nearest);
  if (!(error != 0.0) || error != error) return nearest;  // exact, infinite or NaN
  uint32_t bits = bits_from_float(nearest);
  if (bits & 1u) return nearest;
  // The neighbour on the other side of `value` has an odd last bit.
  const bool away_from_zero = (error > 0.0) == (nearest > 0.0f || (nearest == 0.0f && error > 0.0));
  if ((bits & 0x7fffffffu) == 0u) return float_from_bits((value < 0.0 ? 0x80000000u : 0u) | 1u);
  bits = away_from_zero ? bits + 1u : bits - 1u;
  return float_from_bits(bits);
}

FCRN_HD Half Convert<Half>::from(double value) { return from(round_to_odd(value)); }
FCRN_HD BFloat16 Convert<BFloat16>::from(double value) { return from(round_to_odd(value)); }

// One element of a type that is known only at run time.
template <typename Acc>
FCRN_HD Acc load_as(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float64:
      return Convert<Acc>::from(static_cast<const double*>(data)[index]);
    case DType::float32:
      return Convert<Acc>::from(static_cast<const float*>(data)[index]);
    case DType::float16:
      return Convert<Acc>::from(static_cast<const Half*>(data)[index]);
    case DType::bfloat16:
      return Convert<Acc>::from(static_cast<const BFloat16*>(data)[index]);
    default:
      return Convert<Acc>::from(static_cast<const Bool*>(data)[index]);
  }
}

template <typename Acc>
FCRN_HD void store_as(void* data, DType dtype, int64_t index, Acc value) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(data)[index] = Convert<double>::from(value);
      break;
    case DType::float32:
      static_cast<float*>(data)[index] = Convert<float>::from(value);
      break;
    case DType::float16:
      static_cast<Half*>(data)[index] = Convert<Half>::from(value);
      break;
    default:
      static_cast<BFloat16*>(data)[index] = Convert<BFloat16>::from(value);
  }
}

// Calls `visit` with an element of a floating-point dtype.
template <typename Visit>
auto visit_floating(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::float64:
      return visit(double{});
    case DType::float32:
      return visit(float{});
    case DType::float16:
      return visit(Half{});
    default:
      return visit(BFloat16{});
  }
}

// Calls `visit` with an element of any dtype.
template <typename Visit>
auto visit_element(DType dtype, const Visit& visit) {
  return dtype == DType::boolean ? visit(Bool{}) : visit_floating(dtype, visit);
}

FCRN_HD constexpr int64_t size_of(DType dtype) {
  return dtype == DType::float64   ? 8
         : dtype == DType::float32 ? 4
         : dtype == DType::boolean ? 1
                                   : 2;
}

}  // namespace fcrn
