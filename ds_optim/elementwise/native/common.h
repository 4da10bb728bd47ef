/* What all kernels share: keys of noise, arrays as they are stored, and the walk through blocks of 256 elements.
 *
 * Each operation is rounded by itself and no two are contracted into one, unless the first of them is exact, so that
 * every result has the bits of the eager path (steps.py, blend.py, momentum.py, noise.py), which says what the formulas
 * are. Where there is AVX-512, whole blocks go a faster way (avx512.h) to the same bits. Arrays do not overlap.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define WIDE_VECTORS
#include <immintrin.h>
#endif

enum { NONE, FLOAT32, BFLOAT16, INT8 };
enum { BLOCK = 256, LEVELS = 127, LANES = 32, ROUNDS = 7 /* of Philox */ };

/* (seed, stream, step) of a parameter's noise, and the place of the first element in its parameter. */
typedef struct {
    uint64_t seed, stream, step, start;
} Key;

typedef struct {
    int kind;
    void *values;  /* (n,) */
    float *scales; /* INT8: one for each block that the slice touches */
    Key key;       /* BFLOAT16, INT8 */
} Array;

typedef struct {
    float d0, d1; /* direction = d0 m + d1 g */
    float k0, k1; /* m <- k0 m + k1 g */
} Blend;

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float sign_of(float x) { return (float)(x > 0) - (float)(x < 0); }

/* Where a slice lies in the blocks of its parameter. */
typedef struct {
    int64_t position; /* in the slice */
    int head, count;  /* in the block: elements before the slice, elements of the slice */
    uint64_t begin;   /* of the block in the parameter */
    int64_t number;   /* of the block in the slice */
} Block;

static inline int next_block(Block *b, int64_t n, uint64_t start) {
    if (b->number < 0)
        *b = (Block){0, (int)(start % BLOCK), 0, start / BLOCK * BLOCK, 0};
    else
        *b = (Block){b->position + b->count, 0, 0, b->begin + BLOCK, b->number + 1};
    int64_t left = n - b->position;
    b->count = left < BLOCK - b->head ? (int)left : BLOCK - b->head;
    return left > 0;
}

/* Ask for the first line of the next page: where a page ends, so does what a processor fetches ahead by itself, and a
 * pass over some streams stands still at each page of each. From that line on it goes ahead again. Measured: a fifth of
 * the time of a step; more lines, or a line in each block, gain less. */
static inline void look_ahead(const void *at) {
    enum { PAGE = 4096 };
    const uintptr_t place = (uintptr_t)at % PAGE;
    if (place >= PAGE / 2 && place < PAGE / 4 * 3) __builtin_prefetch((const char *)at + (PAGE - place));
}
