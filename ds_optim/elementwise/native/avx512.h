/* The codecs of momentum and weights for whole blocks of 256 elements, with AVX-512: 16 elements at a time. */
#pragma once

#include "common.h"
#include "noise.h"
#include "scalar.h"

enum { PER_VECTOR = 16, VECTORS_OF_BLOCK = BLOCK / PER_VECTOR };

static inline __m512i broadcast64(uint64_t value) { return _mm512_set1_epi64((long long)value); }
static inline __m512i as_bits(__m512 values) { return _mm512_castps_si512(values); }
static inline __m512 as_floats(__m512i bits) { return _mm512_castsi512_ps(bits); }

/* The low words of two vectors of counters, one of which holds the even ones and one the odd ones. */
static inline __m512i joined(__m512i even, __m512i odd) {
    return as_bits(_mm512_mask_moveldup_ps(as_floats(even), 0xAAAA, as_floats(odd)));
}

/* Philox of the 32 counters of a block: words[2 w], words[2 w + 1] are word w of the first and of the last 16.
 *
 * The step and the high word of the counter are the same for all 32, so that half of the first two rounds is, too.
 */
static inline void wide_noise(__m512i words[8], const Rounds *rounds, uint64_t begin) {
    const uint64_t(*keys)[2] = rounds->keys, first = begin / 8, low = 0xFFFFFFFFu;
    const __m512i m0 = broadcast64(0xD2511F53u), m1 = broadcast64(0xCD9E8D57u);
    const uint64_t p1 = (rounds->step & low) * 0xD2511F53u, c2 = (p1 >> 32) ^ (first >> 32) ^ keys[0][1];
    const uint64_t q2 = c2 * 0xCD9E8D57u;
    const __m512i even = _mm512_add_epi64(_mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0), broadcast64(first & low));
    __m512i c[4][4];
    for (int v = 0; v < 4; v++) {
        const __m512i q1 = _mm512_mul_epu32(_mm512_add_epi64(even, broadcast64((uint64_t)(v / 2 * 16 + v % 2))), m1);
        const __m512i c0 = _mm512_xor_si512(_mm512_srli_epi64(q1, 32), broadcast64((rounds->step >> 32) ^ keys[0][0]));
        const __m512i p = _mm512_mul_epu32(c0, m0);
        c[0][v] = _mm512_xor_si512(q1, broadcast64((q2 >> 32) ^ keys[1][0]));
        c[1][v] = broadcast64(q2);
        c[2][v] = _mm512_xor_si512(_mm512_srli_epi64(p, 32), broadcast64((p1 & low) ^ keys[1][1]));
        c[3][v] = p;
    }
#pragma GCC unroll 8
    for (int round = 2; round < ROUNDS; round++) {
        const __m512i k0 = broadcast64(keys[round][0]), k1 = broadcast64(keys[round][1]);
        for (int v = 0; v < 4; v++) {
            const __m512i p = _mm512_mul_epu32(c[0][v], m0), q = _mm512_mul_epu32(c[2][v], m1);
            c[0][v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(q, 32), c[1][v], k0, 0x96); /* a ^ b ^ c */
            c[1][v] = q;
            c[2][v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p, 32), c[3][v], k1, 0x96);
            c[3][v] = p;
        }
    }
    for (int i = 0; i < 8; i++) words[i] = joined(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

/* Where the bits of elements [16 j, 16 j + 16) of a block are: low halves of a vector of words, or high ones. */
static inline __m512i words_of(const __m512i words[8], int j) { return words[j / 4 * 2 + j % 2]; }
static inline int are_high(int j) { return j % 4 >= 2; }

/* Elements [16 j, 16 j + 32) of a block, j even, rounded to bfloat16. */
static inline void wide_round_bfloat16(uint16_t *out, int j, __m512 low, __m512 high, const __m512i words[8]) {
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                           25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i v[2] = {as_bits(low), as_bits(high)};
    __m512i noise[2];
    for (int i = 0; i < 2; i++) {
        const __m512i both = words_of(words, j + i);
        noise[i] = are_high(j) ? _mm512_srli_epi32(both, 16) : _mm512_and_si512(both, _mm512_set1_epi32(0xFFFF));
    }
    /* Twice the bits are the magnitude's. Up to the largest finite value no sum runs over into the exponent's last. */
    const __m512i most = _mm512_max_epu32(_mm512_add_epi32(v[0], v[0]), _mm512_add_epi32(v[1], v[1]));
    if (__builtin_expect(_mm512_cmpgt_epu32_mask(most, _mm512_set1_epi32((int)(2 * LARGEST_BFLOAT16))), 0)) {
        float values[2 * PER_VECTOR];
        uint32_t bits[2 * PER_VECTOR];
        memcpy(values, v, sizeof values);
        memcpy(bits, noise, sizeof bits);
        for (int i = 0; i < 2 * PER_VECTOR; i++) out[j * PER_VECTOR + i] = rounded_bfloat16(values[i], bits[i]);
        return;
    }
    const __m512i sums[2] = {_mm512_add_epi32(v[0], noise[0]), _mm512_add_epi32(v[1], noise[1])};
    _mm512_storeu_si512(out + j * PER_VECTOR, _mm512_permutex2var_epi16(sums[0], upper, sums[1]));
}

static inline void wide_store_bfloat16(uint16_t *out, const float *values, const Rounds *rounds, uint64_t begin) {
    __m512i words[8];
    wide_noise(words, rounds, begin);
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS_OF_BLOCK; j += 2) {
        const float *at = values + j * PER_VECTOR;
        wide_round_bfloat16(out, j, _mm512_loadu_ps(at), _mm512_loadu_ps(at + PER_VECTOR), words);
    }
}

/* |m| in units of the last code, k of k^2 <= x <= (k + 1)^2, and k + 1 where the noise says so: see "encode".
 *
 * x - k^2 and 2 k + 1 are exact, so that contraction changes nothing there. y is 1 + (bits + 0.5) / 2^16, exactly, and
 * y t - t is rounded once, to what (bits + 0.5) t is but for the power of two. */
static inline __m512i wide_code(__m512 value, __m512 inverse, __m512i words, int high) {
    const __m512 one = _mm512_set1_ps(1), levels = _mm512_set1_ps(LEVELS * LEVELS);
    const __m512 x = _mm512_mul_ps(_mm512_mul_ps(_mm512_abs_ps(value), inverse), levels);
    const __m512 k = _mm512_roundscale_ps(_mm512_sqrt_ps(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512 above = _mm512_fnmadd_ps(k, k, x), t = _mm512_fmadd_ps(k, _mm512_set1_ps(2), one);
    const __m512i shifted = high ? _mm512_srli_epi32(words, 9) : _mm512_slli_epi32(words, 7);
    const __m512 y = as_floats(_mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(0xFFFF << 7),
                                                         _mm512_set1_epi32(0x3F800040), 0xEA)); /* a & b | c */
    const __mmask16 up = _mm512_cmp_ps_mask(_mm512_fmsub_ps(y, t, t), above, _CMP_LT_OQ);
    return _mm512_cvtps_epi32(_mm512_mask_add_ps(k, up, k, one));
}

/* Four vectors of 32 bits to one of 8, too large ones to the largest; in the order that "in_order" puts right. */
static inline __m512i packed(const __m512i v[4]) {
    return _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
}

static inline __m512i in_order(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), bytes);
}

/* The largest of the magnitudes' bits. */
static inline __m512i larger(__m512i most, __m512 values) {
    return _mm512_max_epu32(most, as_bits(_mm512_abs_ps(values)));
}

/* As "encode" with the block's noise, once the magnitudes' bits are known up to the last 16. */
static inline float wide_encode(int8_t *out, const float *values, __m512i sizes, const Rounds *rounds, uint64_t begin) {
    __m512i words[8];
    const float most = from_bits(_mm512_reduce_max_epu32(sizes)), largest = most < 0x1p-126f ? 0 : most;
    if (__builtin_expect(!(most < INFINITY), 0)) {
        uint32_t bits[BLOCK];
        rounding_bits(bits, rounds, begin);
        return encode(BLOCK, out, values, bits);
    }
    wide_noise(words, rounds, begin);
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 1 / largest : 0);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS_OF_BLOCK; j += 4) {
        __m512i codes[4], signs[4];
        for (int i = 0; i < 4; i++) {
            const __m512 value = _mm512_loadu_ps(values + (j + i) * PER_VECTOR);
            codes[i] = wide_code(value, inverse, words_of(words, j + i), are_high(i));
            signs[i] = as_bits(value);
        }
        const __m512i plain = packed(codes);
        const __mmask64 negative = _mm512_movepi8_mask(packed(signs));
        _mm512_storeu_si512(out + j * PER_VECTOR,
                            in_order(_mm512_mask_sub_epi8(plain, negative, _mm512_setzero_si512(), plain)));
    }
    return largest;
}

static inline float wide_store_int8(int8_t *out, const float *values, const Rounds *rounds, uint64_t begin) {
    __m512i sizes = _mm512_setzero_si512();
    for (int i = 0; i < BLOCK; i += PER_VECTOR) sizes = larger(sizes, _mm512_loadu_ps(values + i));
    return wide_encode(out, values, sizes, rounds, begin);
}

/* One vector of a sign step with lr >= 0: p at its place; the next momentum is the result. */
static inline __m512 wide_sign(float *p, __m512 m, __m512 g, Blend w, float lr, float factor) {
    const __m512 c = _mm512_add_ps(_mm512_mul_ps(g, _mm512_set1_ps(w.d1)), _mm512_mul_ps(m, _mm512_set1_ps(w.d0)));
    const __m512 decayed = _mm512_mul_ps(_mm512_loadu_ps(p), _mm512_set1_ps(factor));
    const __mmask16 moves = _mm512_cmp_ps_mask(c, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    const __m512i signed_lr = _mm512_ternarylogic_epi32(as_bits(c), _mm512_set1_epi32((int)0x80000000u),
                                                        as_bits(_mm512_set1_ps(lr)), 0xEA); /* a & b | c */
    _mm512_storeu_ps(p, _mm512_mask_sub_ps(decayed, moves, decayed, as_floats(signed_lr)));
    return _mm512_add_ps(_mm512_mul_ps(m, _mm512_set1_ps(w.k0)), _mm512_mul_ps(g, _mm512_set1_ps(w.k1)));
}

static inline void wide_sign_bfloat16(float *p, uint16_t *m, const float *g, Blend w, float lr, float factor,
                                      const Rounds *rounds, uint64_t begin) {
    __m512i words[8];
    wide_noise(words, rounds, begin);
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS_OF_BLOCK; j += 2) {
        __m512 next[2];
        for (int i = 0; i < 2; i++) {
            const int at = (j + i) * PER_VECTOR;
            const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(m + at)));
            const __m512 momentum = as_floats(_mm512_slli_epi32(bits, 16));
            next[i] = wide_sign(p + at, momentum, _mm512_loadu_ps(g + at), w, lr, factor);
        }
        wide_round_bfloat16(m, j, next[0], next[1], words);
    }
}

static inline float wide_sign_int8(float *p, int8_t *m, float scale, const float *g, Blend w, float lr, float factor,
                                   const Rounds *rounds, uint64_t begin) {
    float values[BLOCK] __attribute__((aligned(64)));
    __m512i sizes = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int at = 0; at < BLOCK; at += PER_VECTOR) {
        const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(m + at)));
        const __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps((float)(1.0 / LEVELS)));
        const __m512 momentum = _mm512_mul_ps(_mm512_mul_ps(t, _mm512_abs_ps(t)), _mm512_set1_ps(scale));
        const __m512 next = wide_sign(p + at, momentum, _mm512_loadu_ps(g + at), w, lr, factor);
        _mm512_store_ps(values + at, next);
        sizes = larger(sizes, next);
    }
    return wide_encode(m, values, sizes, rounds, begin);
}
