// SPDX-License-Identifier: Apache-2.0

#include "accumulate.h"

#include <math.h>

#include <algorithm>

#include "../numerics.h"

namespace vnvfp4_host {

namespace {

constexpr int kZeroExponent = -126;  // of a zero operand: never the largest next to a value
constexpr uint32_t kNanF32 = 0x7FFFFFFF;

struct E4m3Table {
  float value[256];
  int16_t exponent[256];
  E4m3Table() {
    for (int code = 0; code < 256; ++code) {
      value[code] = e4m3_to_float(static_cast<uint8_t>(code));
      const int field = code >> 3 & 15;
      exponent[code] =
          static_cast<int16_t>((code & 0x7F) == 0 ? kZeroExponent : std::max(field, 1) - 7);
    }
  }
};
const E4m3Table e4m3_table;

float decode(Element element, uint32_t code) {
  switch (element) {
    case Element::kBf16:
      return bfloat16_bits_to_float(static_cast<uint16_t>(code));
    case Element::kF16:
      return half_bits_to_float(static_cast<uint16_t>(code));
    default:
      return e4m3_table.value[code & 0xFF];
  }
}

// The exponent of the leading digit; subnormals have the format's smallest.
int exponent_of(float value, int min_exponent) {
  if (value == 0) return kZeroExponent;
  const int field = static_cast<int>(bit_cast<uint32_t>(value) >> 23 & 0xFF);
  return std::max(field - 127, min_exponent);
}

float decode_accumulator(uint32_t bits, bool is_half) {
  return is_half ? half_bits_to_float(static_cast<uint16_t>(bits)) : bit_cast<float>(bits);
}

// Toward zero, but from the range's end on it overflows.
float cut_to_float(double value) {
  if (fabs(value) >= 0x1p128) return copysignf(INFINITY, static_cast<float>(value));
  const float nearest = static_cast<float>(value);
  return fabs(static_cast<double>(nearest)) > fabs(value) ? nextafterf(nearest, 0.0f) : nearest;
}

// Infinities and NaNs: what IEEE addition gives, with NVIDIA's canonical NaN. False if the row and
// column hold none.
bool resolve_special(const float* a, const float (*b)[8], int n, int k, bool has_half_output,
                     uint32_t* c) {
  double sum = decode_accumulator(*c, has_half_output);
  for (int i = 0; i < k; ++i) sum += static_cast<double>(a[i]) * b[i][n];
  if (isfinite(sum)) return false;
  if (isnan(sum)) {
    *c = has_half_output ? 0x7FFF : kNanF32;
  } else {
    *c = has_half_output ? double_to_half_bits(sum) : bit_cast<uint32_t>(static_cast<float>(sum));
  }
  return true;
}

template <int kCount>
bool all_finite(const float (&values)[kCount]) {
  // x - x is zero for a finite x and NaN otherwise
  float sum = 0;
  for (int i = 0; i < kCount; ++i) sum += values[i] - values[i];
  return sum == 0;
}

struct Values {
  float a[16][32];
  float b[32][8];
};

void decode_tile(const Tile& tile, Element element, int k, Values& values) {
  for (int m = 0; m < 16; ++m) {
    for (int i = 0; i < k; ++i) values.a[m][i] = decode(element, tile.a[m][i]);
  }
  for (int i = 0; i < k; ++i) {
    for (int n = 0; n < 8; ++n) values.b[i][n] = decode(element, tile.b[i][n]);
  }
}

// One step of the Ada FP8 model for a row of eight outputs. first: where the 16 of k begin.
void add_ada_fp8(const Tile& tile, const Values& values, int m, int first, bool has_half_output,
                 uint32_t* c_bits) {
  float c[8];
  int16_t largest[8];
  const int min_exponent = has_half_output ? -14 : -126;
  for (int n = 0; n < 8; ++n) {
    c[n] = decode_accumulator(c_bits[n], has_half_output);
    largest[n] = static_cast<int16_t>(exponent_of(c[n], min_exponent));
  }
  for (int i = first; i < first + 16; ++i) {
    const int16_t a_exponent = e4m3_table.exponent[tile.a[m][i]];
    for (int n = 0; n < 8; ++n) {
      const int16_t sum = static_cast<int16_t>(a_exponent + e4m3_table.exponent[tile.b[i][n]]);
      largest[n] = std::max(largest[n], sum);
    }
  }
  float scale[8];
  int32_t sum[8];
  for (int n = 0; n < 8; ++n) {
    // Below -100 all products are zero: any scale does, and this one stays a normal float.
    scale[n] =
        bit_cast<float>(static_cast<uint32_t>(13 - std::max<int>(largest[n], -100) + 127) << 23);
    sum[n] = static_cast<int32_t>(c[n] * scale[n]);
  }
  for (int i = first; i < first + 16; ++i) {
    const float a = values.a[m][i];
    // A product has 8 significant bits and the scale is a power of two: exact before the cut.
    for (int n = 0; n < 8; ++n) sum[n] += static_cast<int32_t>(a * values.b[i][n] * scale[n]);
  }
  for (int n = 0; n < 8; ++n) {
    if (has_half_output) {
      c_bits[n] = double_to_half_bits(ldexp(sum[n], largest[n] - 13));
    } else if (largest[n] <= -100) {
      c_bits[n] &= ~0x3FFu;  // c alone, cut where its own exponent puts the 13th bit
    } else {
      const double exact = ldexp(sum[n], largest[n] - 13);
      c_bits[n] = bit_cast<uint32_t>(static_cast<float>(exact)) & ~0x3FFu;
    }
  }
}

}  // namespace

void multiply_int8(Tile& tile, int k) {
  for (int m = 0; m < 16; ++m) {
    for (int i = 0; i < k; ++i) {
      const int a = static_cast<int8_t>(tile.a[m][i]);
      for (int n = 0; n < 8; ++n) {
        tile.c[m][n] += static_cast<uint32_t>(a * static_cast<int8_t>(tile.b[i][n]));
      }
    }
  }
}

void multiply_exact(Tile& tile, Element element, int k, bool has_half_output) {
  Values values;
  decode_tile(tile, element, k, values);
  for (int m = 0; m < 16; ++m) {
    double sum[8];
    for (int n = 0; n < 8; ++n) sum[n] = decode_accumulator(tile.c[m][n], has_half_output);
    for (int i = 0; i < k; ++i) {
      const double a = values.a[m][i];
      for (int n = 0; n < 8; ++n) sum[n] += a * values.b[i][n];
    }
    for (int n = 0; n < 8; ++n) {
      if (sum[n] != sum[n]) {
        tile.c[m][n] = has_half_output ? 0x7FFF : kNanF32;
      } else {
        tile.c[m][n] = has_half_output ? double_to_half_bits(sum[n])
                                       : bit_cast<uint32_t>(static_cast<float>(sum[n]));
      }
    }
  }
}

void multiply_ada_fp8(Tile& tile, int k, bool has_half_output) {
  Values values;
  decode_tile(tile, Element::kE4m3, k, values);
  for (int first = 0; first < k; first += 16) {
    for (int m = 0; m < 16; ++m) {
      uint32_t special[8];
      bool is_special[8];
      bool has_special = false;
      for (int n = 0; n < 8; ++n) {
        special[n] = tile.c[m][n];
        is_special[n] = resolve_special(values.a[m] + first, values.b + first, n, 16,
                                        has_half_output, &special[n]);
        has_special |= is_special[n];
      }
      add_ada_fp8(tile, values, m, first, has_half_output, tile.c[m]);
      for (int n = 0; has_special && n < 8; ++n) {
        if (is_special[n]) tile.c[m][n] = special[n];
      }
    }
  }
}

void multiply_ada_half(Tile& tile, Element element, bool has_half_output) {
  constexpr int kStep = 8;
  constexpr int kFractionBits = 24;
  Values values;
  decode_tile(tile, element, 16, values);
  const int min_exponent = element == Element::kF16 ? -14 : -126;
  const int min_accumulator = has_half_output ? -14 : -126;
  for (int first = 0; first < 16; first += kStep) {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        uint32_t& c_bits = tile.c[m][n];
        if (resolve_special(values.a[m] + first, values.b + first, n, kStep, has_half_output,
                            &c_bits)) {
          continue;
        }
        const float c = decode_accumulator(c_bits, has_half_output);
        int largest = exponent_of(c, min_accumulator);
        for (int i = first; i < first + kStep; ++i) {
          largest = std::max(largest, exponent_of(values.a[m][i], min_exponent) +
                                          exponent_of(values.b[i][n], min_exponent));
        }
        const double scale = ldexp(1.0, kFractionBits - largest);
        int64_t sum = static_cast<int64_t>(c * scale);
        for (int i = first; i < first + kStep; ++i) {
          sum += static_cast<int64_t>(static_cast<double>(values.a[m][i]) * values.b[i][n] * scale);
        }
        const double exact = ldexp(static_cast<double>(sum), largest - kFractionBits);
        c_bits =
            has_half_output ? double_to_half_bits(exact) : bit_cast<uint32_t>(cut_to_float(exact));
      }
    }
  }
}

}  // namespace vnvfp4_host
