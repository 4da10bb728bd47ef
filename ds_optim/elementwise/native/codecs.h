/* Values in 16 and 8 bits: a block of them widened to fp32, and rounded back by the noise of its elements. */
#pragma once

#include "common.h"
#include "noise.h"
#include "scalar.h"
#ifdef WIDE_VECTORS
#include "avx512.h"
#endif

/* The block's values in fp32: where they are, if that is how they are stored, or in "scratch". */
static inline float *load(const Array *a, const Block *b, float *restrict scratch) {
    if (a->kind == FLOAT32) {
        look_ahead((float *)a->values + b->position);
        return (float *)a->values + b->position;
    }
    if (a->kind == BFLOAT16) {
        const uint16_t *values = (const uint16_t *)a->values + b->position;
        look_ahead(values);
        widen_bfloat16(b->count, values, scratch);
    } else if (a->kind == INT8) {
        const int8_t *codes = (const int8_t *)a->values + b->position;
        look_ahead(codes);
        decode(b->count, codes, a->scales[b->number], scratch);
    }
    return scratch;
}

/* Round what "load" gave, and has changed since, back to the block. */
static inline void store(const Array *a, const Block *b, const Rounds *rounds, const float *restrict values) {
    if (a->kind != BFLOAT16 && a->kind != INT8) return;
#ifdef WIDE_VECTORS
    if (b->count == BLOCK) {
        if (a->kind == BFLOAT16)
            wide_store_bfloat16((uint16_t *)a->values + b->position, values, rounds, b->begin);
        else
            a->scales[b->number] = wide_store_int8((int8_t *)a->values + b->position, values, rounds, b->begin);
        return;
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
