/* Values in 16 and 8 bits: a block of them widened to fp32, and rounded back by the noise of its elements. */
#pragma once

#include "common.h"
#include "noise.h"
#ifdef WIDE_VECTORS
#include "avx512.h"
#endif

static inline uint16_t nearest_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

/* Between two values of bfloat16 or none, as the bits say; what is not finite stays what it is. */
static inline uint16_t rounded_bfloat16(float value, uint32_t bits) {
    const uint32_t whole = to_bits(value), size = whole & 0x7FFFFFFFu;
    uint32_t magnitude = size > 0x7F7F0000u ? 0x7F7F0000u : size;
    magnitude += bits;
    magnitude = magnitude > 0x7F7F0000u ? 0x7F7F0000u : magnitude;
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

/* What the block of an array is rounded to, and its scale. */
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

/* The block's values in fp32: where they are, if that is how they are stored, or in "room". */
static inline float *load(const Array *a, const Block *b, float *restrict room) {
    if (a->kind == FLOAT32) {
        look_ahead((float *)a->values + b->position);
        return (float *)a->values + b->position;
    }
    if (a->kind == BFLOAT16) {
        const uint16_t *values = (const uint16_t *)a->values + b->position;
        look_ahead(values);
        widen_bfloat16(b->count, values, room);
    } else if (a->kind == INT8) {
        const int8_t *codes = (const int8_t *)a->values + b->position;
        look_ahead(codes);
        decode(b->count, codes, a->scales[b->number], room);
    }
    return room;
}

/* Round what "load" gave, and has changed since, back to the block. */
static inline void store(const Array *a, const Block *b, const Rounds *rounds, const float *restrict values) {
    if (a->kind != BFLOAT16 && a->kind != INT8) return;
#ifdef WIDE_VECTORS
    if (b->count == BLOCK) {
        if (a->kind == BFLOAT16) {
            if (wide_store_bfloat16((uint16_t *)a->values + b->position, values, rounds, b->begin)) return;
        } else {
            a->scales[b->number] = wide_encode((int8_t *)a->values + b->position, values, rounds, b->begin);
            return;
        }
    }
#endif
    uint32_t noise[BLOCK];
    rounding_bits(noise, rounds, b->begin);
    const uint32_t *bits = noise + b->head;
    if (a->kind == BFLOAT16) {
        uint16_t *out = (uint16_t *)a->values + b->position;
        for (int i = 0; i < b->count; i++) out[i] = rounded_bfloat16(values[i], bits[i]);
    } else {
        a->scales[b->number] = encode(b->count, (int8_t *)a->values + b->position, values, bits);
    }
}
