/* The codecs as any processor has them. Plain loops, which compilers vectorize. */
#pragma once

#include "common.h"

#define LARGEST_BFLOAT16 0x7F7F0000u /* as the upper half of an fp32 */

static inline uint16_t nearest_bfloat16(float value) {
    const uint32_t bits = to_bits(value), nearest = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest);
}

/* Between two values of bfloat16 or none, as the bits say; what is not finite stays what it is. */
static inline uint16_t rounded_bfloat16(float value, uint32_t bits) {
    const uint32_t whole = to_bits(value), size = whole & 0x7FFFFFFFu;
    uint32_t magnitude = size > LARGEST_BFLOAT16 ? LARGEST_BFLOAT16 : size;
    magnitude += bits;
    magnitude = magnitude > LARGEST_BFLOAT16 ? LARGEST_BFLOAT16 : magnitude;
    magnitude = size == 0x7F800000u ? 0x7F800000u : magnitude;
    magnitude = size > 0x7F800000u ? 0x7FC00000u : magnitude;
    return (uint16_t)((magnitude | (whole & 0x80000000u)) >> 16);
}

static inline void widen_bfloat16(int n, const uint16_t *restrict values, float *restrict out) {
    for (int i = 0; i < n; i++) out[i] = from_bits((uint32_t)values[i] << 16);
}

static inline void decode(int n, const int8_t *restrict codes, float scale, float *restrict out) {
    for (int i = 0; i < n; i++) {
        float t = (float)codes[i] * (float)(1.0 / LEVELS);
        out[i] = (t * fabsf(t)) * scale;
    }
}

/* The codes of a block, by the noise of its elements; the result is its scale. */
static inline float encode(int n, int8_t *restrict out, const float *restrict values, const uint32_t *restrict bits) {
    uint32_t most = 0; /* numbers without a sign are ordered as their bits are */
    for (int i = 0; i < n; i++) {
        uint32_t size = to_bits(values[i]) & 0x7FFFFFFFu;
        most = size > most ? size : most;
    }
    const float largest = from_bits(most) < 0x1p-126f ? 0 : from_bits(most);
    const float inverse = largest > 0 ? 1 / largest : 0;
    for (int i = 0; i < n; i++) {
        float x = (fabsf(values[i]) * inverse) * (float)(LEVELS * LEVELS);
        float k = floorf(sqrtf(x));
        float above = (x - k * k) * 0x1p16f;
        k = ((float)(int32_t)bits[i] + 0.5f) * (k * 2 + 1) < above ? k + 1 : k;
        k = k > LEVELS ? LEVELS : k;
        out[i] = (int8_t)(int32_t)copysignf(k, values[i]);
    }
    return largest;
}
