/* Philox4x32-10 and the bits that values are rounded by (noise.py). */
#pragma once

#include "common.h"

/* Eight lanes of 64 bits, a word of 32 in the low half of each; what stands in the high half does not matter. */
typedef uint64_t Wide __attribute__((vector_size(64)));
typedef uint32_t Narrow __attribute__((vector_size(32)));
enum { WIDTH = 8, VECTORS = LANES / WIDTH };

static inline Wide product(Wide a, uint32_t b) {
#ifdef WIDE_VECTORS
    return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); /* compilers do not see that 64 x 64 is too much */
#else
    return (a & 0xFFFFFFFFu) * b;
#endif
}

/* The step and the key of each of the ten rounds, each key in the low half of 64 bits. */
typedef struct {
    uint64_t step, keys[10][2];
} Rounds;

static inline Rounds rounds_of(uint64_t step, uint32_t seed, uint32_t stream) {
    Rounds r = {.step = step};
    for (int i = 0; i < 10; i++) {
        r.keys[i][0] = seed + (uint32_t)i * 0x9E3779B9u;
        r.keys[i][1] = stream + (uint32_t)i * 0xBB67AE85u;
    }
    return r;
}

/* Of the bits that an array is rounded by; its stream is the parameter's, with every bit turned over. */
static inline Rounds rounding_of(const Array *a) {
    return rounds_of(a->key.step, (uint32_t)a->key.seed, (uint32_t)a->key.stream ^ 0xFFFFFFFFu);
}

/* Philox4x32-10 of LANES counters (step, first ... first + LANES - 1), a word of each in words[i]. */
static inline void philox(uint32_t words[4][LANES], uint64_t first, const Rounds *rounds) {
    const uint64_t step = rounds->step;
    const Wide ramp = {0, 1, 2, 3, 4, 5, 6, 7};
    Wide c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const Wide element = ramp + (first + (uint64_t)(v * WIDTH));
        c0[v] = (Wide){0} + step;
        c1[v] = (Wide){0} + (step >> 32);
        c2[v] = element;
        c3[v] = element >> 32;
    }
    for (int round = 0; round < 10; round++) {
        for (int v = 0; v < VECTORS; v++) {
            const Wide p = product(c0[v], 0xD2511F53u), q = product(c2[v], 0xCD9E8D57u);
            c0[v] = (q >> 32) ^ c1[v] ^ rounds->keys[round][0];
            c1[v] = q;
            c2[v] = (p >> 32) ^ c3[v] ^ rounds->keys[round][1];
            c3[v] = p;
        }
    }
    for (int v = 0; v < VECTORS; v++) {
        const Narrow found[4] = {__builtin_convertvector(c0[v], Narrow), __builtin_convertvector(c1[v], Narrow),
                                 __builtin_convertvector(c2[v], Narrow), __builtin_convertvector(c3[v], Narrow)};
        for (int w = 0; w < 4; w++) memcpy(&words[w][v * WIDTH], &found[w], sizeof(Narrow));
    }
}

/* 16 random bits for each element of the block of 256 that begins at "begin", a multiple of 256: of 32 counters first
 * the low halves of the first words, then the high ones, and so on through the four words. */
static inline void rounding_bits(uint32_t bits[BLOCK], const Rounds *rounds, uint64_t begin) {
    uint32_t words[4][LANES];
    philox(words, begin / 8, rounds);
    for (int w = 0; w < 4; w++)
        for (int i = 0; i < LANES; i++) {
            bits[2 * w * LANES + i] = words[w][i] & 0xFFFFu;
            bits[(2 * w + 1) * LANES + i] = words[w][i] >> 16;
        }
}
