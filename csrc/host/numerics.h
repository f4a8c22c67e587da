// SPDX-License-Identifier: Apache-2.0
// Bit-exact scalar conversions between the types that the kernels use, on integers alone.
#pragma once

#include <stdint.h>
#include <string.h>

namespace vnvfp4_host {

template <typename To, typename From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

inline float half_bits_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7FFF;
  if (magnitude >= 0x7C00) {  // infinity, NaN
    return bit_cast<float>(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  }
  if (magnitude >= 0x0400) {  // normal: re-bias 15 to 127
    return bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  }
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(subnormal));
}

// Rounds sign * significand * 2^exponent (significand a 53-bit integer at most) to nearest even
// with `mantissa_bits` fraction bits and smallest exponent `min_exponent`; returns the biased bits
// without the sign. Overflow carries into the exponent field and is left to the caller.
inline uint32_t round_to_format(double magnitude, int mantissa_bits, int min_exponent) {
  const uint64_t bits = bit_cast<uint64_t>(magnitude);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  uint64_t significand = (bits & 0xFFFFFFFFFFFFFull) | 1ull << 52;
  if (exponent == -1023) return 0;  // below every format here
  int drop = 52 - mantissa_bits;
  if (exponent < min_exponent) drop += min_exponent - exponent;
  if (drop > 54) return 0;
  const uint64_t half = 1ull << (drop - 1);
  const uint64_t rest = significand & ((1ull << drop) - 1);
  uint64_t kept = significand >> drop;
  if (rest > half || (rest == half && (kept & 1))) ++kept;
  if (exponent < min_exponent) return static_cast<uint32_t>(kept);  // may carry to the first normal
  return static_cast<uint32_t>(kept +
                               (static_cast<uint64_t>(exponent - min_exponent) << mantissa_bits));
}

inline uint16_t double_to_half_bits(double value) {
  const uint16_t sign = static_cast<uint16_t>(bit_cast<uint64_t>(value) >> 48 & 0x8000);
  const double magnitude = __builtin_fabs(value);
  if (value != value) return 0x7FFF;
  if (magnitude >= 65520.0) return static_cast<uint16_t>(sign | 0x7C00);
  return static_cast<uint16_t>(sign | round_to_format(magnitude, 10, -14));
}

inline uint16_t float_to_half_bits(float value) { return double_to_half_bits(value); }

inline float bfloat16_bits_to_float(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t float_to_bfloat16_bits(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float e4m3_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t magnitude = code & 0x7F;
  if (magnitude == 0x7F) return bit_cast<float>(sign | 0x7FC00000);
  if (magnitude >= 8) return bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(subnormal));
}

// Every e4m3 value is a half, so this is exact; NaN becomes 0x7FFF as on the device.
inline uint16_t e4m3_to_half_bits(uint32_t code) {
  if ((code & 0x7F) == 0x7F) return 0x7FFF;
  return float_to_half_bits(e4m3_to_float(static_cast<uint8_t>(code)));
}

// Nearest even, saturating to +-448 (infinity too); NaN becomes 0x7F.
inline uint8_t float_to_e4m3(float value) {
  if (value != value) return 0x7F;
  const uint8_t sign = static_cast<uint8_t>(bit_cast<uint32_t>(value) >> 24 & 0x80);
  const double magnitude = __builtin_fabs(value);
  if (magnitude >= 448.0) return sign | 0x7E;
  const uint32_t bits = round_to_format(magnitude, 3, -6);
  return static_cast<uint8_t>(sign | (bits > 0x7E ? 0x7E : bits));
}

// prmt.b32 in its default mode: nibble i of the selector picks byte i of the result from the eight
// bytes high:low; bit 3 of the nibble replicates the picked byte's sign instead.
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t source = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 0xF;
    uint32_t byte = static_cast<uint32_t>(source >> (8 * (pick & 7))) & 0xFF;
    if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << (8 * i);
  }
  return result;
}

}  // namespace vnvfp4_host
