/* Philox4x32-7 and the bits that values are rounded by (noise.py). */
#pragma once

#include "common.h"

/* The step and the key of each of the rounds, each key in the low half of 64 bits. */
typedef struct {
    uint64_t step, keys[ROUNDS][2];
} Rounds;

static inline Rounds rounds_of(uint64_t step, uint32_t seed, uint32_t stream) {
    Rounds r = {.step = step};
    for (int i = 0; i < ROUNDS; i++) {
        r.keys[i][0] = seed + (uint32_t)i * 0x9E3779B9u;
        r.keys[i][1] = stream + (uint32_t)i * 0xBB67AE85u;
    }
    return r;
}

/* Of the bits that an array is rounded by; its stream is the parameter's, with every bit turned over. */
static inline Rounds rounding_of(const Array *a) {
    return rounds_of(a->key.step, (uint32_t)a->key.seed, (uint32_t)a->key.stream ^ 0xFFFFFFFFu);
}

/* Philox4x32-7 of LANES counters (step, first ... first + LANES - 1), a word of each in words[i]. */
static inline void philox(uint32_t words[4][LANES], uint64_t first, const Rounds *rounds) {
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    for (int i = 0; i < LANES; i++) {
        c0[i] = (uint32_t)rounds->step;
        c1[i] = (uint32_t)(rounds->step >> 32);
        c2[i] = (uint32_t)(first + (uint64_t)i);
        c3[i] = (uint32_t)((first + (uint64_t)i) >> 32);
    }
    for (int round = 0; round < ROUNDS; round++) {
        const uint32_t k0 = (uint32_t)rounds->keys[round][0], k1 = (uint32_t)rounds->keys[round][1];
        for (int i = 0; i < LANES; i++) {
            const uint64_t p = (uint64_t)c0[i] * 0xD2511F53u, q = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(q >> 32) ^ c1[i] ^ k0;
            c1[i] = (uint32_t)q;
            c2[i] = (uint32_t)(p >> 32) ^ c3[i] ^ k1;
            c3[i] = (uint32_t)p;
        }
    }
    memcpy(words[0], c0, sizeof c0);
    memcpy(words[1], c1, sizeof c1);
    memcpy(words[2], c2, sizeof c2);
    memcpy(words[3], c3, sizeof c3);
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
