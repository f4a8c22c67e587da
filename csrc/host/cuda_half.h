// SPDX-License-Identifier: Apache-2.0
// CUDA's 16-bit floating-point types and the arithmetic that kernels use on them.
// Each operation computes in float and rounds once: exact for +, -, * and (in double) fma.
#pragma once

#include <math.h>

#include "cuda_host.h"
#include "numerics.h"

struct __half_raw {
  unsigned short x;
};
struct __nv_bfloat16_raw {
  unsigned short x;
};

#define VNVFP4_DEFINE_16_BIT_TYPE(Type, Type2, Raw, to_float, from_float)                 \
  struct __attribute__((aligned(2))) Type {                                               \
    unsigned short bits;                                                                  \
    Type() = default;                                                                     \
    Type(float value) : bits(vnvfp4_host::from_float(value)) {}                           \
    Type(double value) : Type(static_cast<float>(value)) {}                               \
    Type(int value) : Type(static_cast<float>(value)) {}                                  \
    Type(Raw raw) : bits(raw.x) {}                                                        \
    operator float() const { return vnvfp4_host::to_float(bits); }                        \
    operator Raw() const { return Raw{bits}; }                                            \
  };                                                                                      \
  struct __attribute__((aligned(4))) Type2 {                                              \
    Type x, y;                                                                            \
    Type2() = default;                                                                    \
    Type2(Type low, Type high) : x(low), y(high) {}                                       \
  };                                                                                      \
  inline Type operator+(Type a, Type b) { return Type(float(a) + float(b)); }             \
  inline Type operator-(Type a, Type b) { return Type(float(a) - float(b)); }             \
  inline Type operator*(Type a, Type b) { return Type(float(a) * float(b)); }             \
  inline Type operator-(Type a) { return Type(-float(a)); }                               \
  inline Type __hadd(Type a, Type b) { return a + b; }                                    \
  inline Type __hsub(Type a, Type b) { return a - b; }                                    \
  inline Type __hmul(Type a, Type b) { return a * b; }                                    \
  inline Type __hneg(Type a) { return -a; }                                               \
  inline Type __habs(Type a) { return Type(fabsf(float(a))); }                            \
  inline Type __hmax(Type a, Type b) { return Type(fmaxf(float(a), float(b))); }          \
  inline Type __hmin(Type a, Type b) { return Type(fminf(float(a), float(b))); }          \
  inline bool __hisnan(Type a) { return isnan(float(a)); }                                \
  inline Type2 __hadd2(Type2 a, Type2 b) { return {a.x + b.x, a.y + b.y}; }               \
  inline Type2 __hsub2(Type2 a, Type2 b) { return {a.x - b.x, a.y - b.y}; }               \
  inline Type2 __hmul2(Type2 a, Type2 b) { return {a.x * b.x, a.y * b.y}; }               \
  inline Type2 __hneg2(Type2 a) { return {-a.x, -a.y}; }                                  \
  inline Type2 __habs2(Type2 a) { return {__habs(a.x), __habs(a.y)}; }                    \
  inline Type2 __hmax2(Type2 a, Type2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; } \
  inline Type2 __hmin2(Type2 a, Type2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; } \
  inline Type2 __hfma2(Type2 a, Type2 b, Type2 c) {                                       \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                \
  }

// fma: the product of two 11-bit significands and the sum are formed in double. The sum of a half
// product and a half is exact there; for bfloat16 a sum that needs more than 53 bits is rounded to
// odd first, so that the second rounding is right.
namespace vnvfp4_host {
inline double add_round_to_odd(double a, double b) {
  const double sum = a + b;
  if (!isfinite(sum)) return sum;  // the error of an infinite sum is no number
  const double part = sum - a;
  const double error = (a - (sum - part)) + (b - part);  // two-sum: exact
  if (error == 0 || (bit_cast<uint64_t>(sum) & 1)) return sum;
  const bool is_away = (error > 0) == (sum > 0);
  return bit_cast<double>(bit_cast<uint64_t>(sum) + (is_away ? 1 : -1));
}
inline uint16_t double_to_bfloat16_bits(double value) {
  if (value != value) return 0x7FFF;
  const uint16_t sign = static_cast<uint16_t>(bit_cast<uint64_t>(value) >> 48 & 0x8000);
  const double magnitude = __builtin_fabs(value);
  if (magnitude >= 0x1.FFp127) return static_cast<uint16_t>(sign | 0x7F80);
  return static_cast<uint16_t>(sign | round_to_format(magnitude, 7, -126));
}
}  // namespace vnvfp4_host

struct __half;
struct __nv_bfloat16;
inline __half __hfma(__half a, __half b, __half c);
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c);

VNVFP4_DEFINE_16_BIT_TYPE(__half, __half2, __half_raw, half_bits_to_float, float_to_half_bits)
VNVFP4_DEFINE_16_BIT_TYPE(__nv_bfloat16, __nv_bfloat162, __nv_bfloat16_raw, bfloat16_bits_to_float,
                          float_to_bfloat16_bits)
#undef VNVFP4_DEFINE_16_BIT_TYPE

using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __half __hfma(__half a, __half b, __half c) {
  const double product = double(float(a)) * double(float(b));
  const double sum = vnvfp4_host::add_round_to_odd(product, float(c));
  return __half(__half_raw{vnvfp4_host::double_to_half_bits(sum)});
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  const double product = double(float(a)) * double(float(b));
  const double sum = vnvfp4_host::add_round_to_odd(product, float(c));
  return __nv_bfloat16(__nv_bfloat16_raw{vnvfp4_host::double_to_bfloat16_bits(sum)});
}

inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline float __half2float(__half value) { return float(value); }
inline __half2 __float2half2_rn(float value) { return {__half(value), __half(value)}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__half(low), __half(high)}; }
inline __half2 __float22half2_rn(float2 value) { return {__half(value.x), __half(value.y)}; }
inline float2 __half22float2(__half2 value) { return {float(value.x), float(value.y)}; }
inline __half2 __half2half2(__half value) { return {value, value}; }
inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
inline float __low2float(__half2 value) { return value.x; }
inline float __high2float(__half2 value) { return value.y; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }

inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return float(value); }
inline __nv_bfloat162 __float2bfloat162_rn(float value) {
  return {__nv_bfloat16(value), __nv_bfloat16(value)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__nv_bfloat16(low), __nv_bfloat16(high)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) {
  return {__nv_bfloat16(value.x), __nv_bfloat16(value.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {float(value.x), float(value.y)}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 value) { return {value, value}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) {
  return {low, high};
}
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 value) { return value.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 value) { return value.y; }
inline float __low2float(__nv_bfloat162 value) { return value.x; }
inline float __high2float(__nv_bfloat162 value) { return value.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return __nv_bfloat16(__nv_bfloat16_raw{bits});
}
