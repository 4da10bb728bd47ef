/* One pass over memory for the steps that every rule ends in, and the codecs of momentum in 16 and 8 bits.
 *
 * Each operation is rounded by itself and no two are contracted into one, so that every result has the bits of the
 * eager path (steps.py, blend.py, momentum.py, noise.py), which says what the formulas are. Arrays do not overlap.
 * "key" is (seed, stream, step) of a parameter's noise, "start" the place of the first element in its parameter.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { NONE, FLOAT32, BFLOAT16, INT8 };
enum { BLOCK = 256, LEVELS = 127, LANES = 32 };

typedef struct {
    uint64_t seed, stream, step, start;
} Key;

typedef struct {
    int kind;      /* of the momentum */
    void *values;  /* (n,) */
    float *scales; /* INT8: one for each block that the slice touches */
    Key key;
} Momentum;

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

/* ------------------------------------------------------------------------------------------------ noise */

/* Eight lanes of 64 bits, a word of 32 in the low half of each; what stands in the high half does not matter. */
typedef uint64_t Wide __attribute__((vector_size(64)));
typedef uint32_t Narrow __attribute__((vector_size(32)));
enum { WIDTH = 8, VECTORS = LANES / WIDTH };

static inline Wide product(Wide a, uint32_t b) {
#ifdef __AVX512F__
    return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); /* compilers do not see that 64 x 64 is too much */
#else
    return (a & 0xFFFFFFFFu) * b;
#endif
}

/* Philox4x32-10 of LANES counters (step, first ... first + LANES - 1), a word of each in words[i]. */
static inline void philox(uint32_t words[4][LANES], uint64_t first, uint64_t step, uint32_t k0, uint32_t k1) {
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
            c0[v] = (q >> 32) ^ c1[v] ^ k0;
            c1[v] = q;
            c2[v] = (p >> 32) ^ c3[v] ^ k1;
            c3[v] = p;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int v = 0; v < VECTORS; v++) {
        const Narrow found[4] = {__builtin_convertvector(c0[v], Narrow), __builtin_convertvector(c1[v], Narrow),
                                 __builtin_convertvector(c2[v], Narrow), __builtin_convertvector(c3[v], Narrow)};
        for (int w = 0; w < 4; w++) memcpy(&words[w][v * WIDTH], &found[w], sizeof(Narrow));
    }
}

/* 16 random bits for each element of the block of 256 that begins at "begin", a multiple of 256: of 32 counters first
 * the low halves of the first words, then the high ones, and so on through the four words. */
static inline void rounding_bits(uint32_t bits[BLOCK], Key key, uint64_t begin) {
    uint32_t words[4][LANES];
    philox(words, begin / 8, key.step, (uint32_t)key.seed, (uint32_t)key.stream ^ 0xFFFFFFFFu);
    for (int w = 0; w < 4; w++)
        for (int i = 0; i < LANES; i++) {
            bits[2 * w * LANES + i] = words[w][i] & 0xFFFFu;
            bits[(2 * w + 1) * LANES + i] = words[w][i] >> 16;
        }
}

void ds_optim_uniform_noise(int64_t n, float *out, Key key) {
    uint32_t words[4][LANES];
    for (int64_t i = 0; i < n; i += LANES) {
        philox(words, key.start + (uint64_t)i, key.step, (uint32_t)key.seed, (uint32_t)key.stream);
        int count = n - i < LANES ? (int)(n - i) : LANES;
        for (int j = 0; j < count; j++) out[i + j] = (float)(((double)words[0][j] + 0.5) * 0x1p-31 - 1.0);
    }
}

/* ------------------------------------------------------------------------------ momentum, block by block */

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

static inline void load(const Momentum *m, const Block *b, float *restrict out) {
    if (m->kind == BFLOAT16) {
        const uint16_t *values = (const uint16_t *)m->values + b->position;
        for (int i = 0; i < b->count; i++) out[i] = from_bits((uint32_t)values[i] << 16);
    } else {
        const int8_t *codes = (const int8_t *)m->values + b->position;
        const float scale = m->scales[b->number];
        for (int i = 0; i < b->count; i++) {
            float t = (float)codes[i] * (float)(1.0 / LEVELS);
            out[i] = (t * fabsf(t)) * scale;
        }
    }
}

static inline void store(const Momentum *m, const Block *b, const float *restrict values) {
    uint32_t noise[BLOCK];
    rounding_bits(noise, m->key, b->begin);
    const uint32_t *bits = noise + b->head;
    if (m->kind == BFLOAT16) {
        uint16_t *out = (uint16_t *)m->values + b->position;
        for (int i = 0; i < b->count; i++) {
            uint32_t whole = to_bits(values[i]), magnitude = whole & 0x7FFFFFFFu;
            magnitude = magnitude > 0x7F7F0000u ? 0x7F7F0000u : magnitude;
            magnitude += bits[i];
            magnitude = magnitude > 0x7F7F0000u ? 0x7F7F0000u : magnitude;
            magnitude = (whole & 0x7FFFFFFFu) == 0x7F800000u ? 0x7F800000u : magnitude;
            magnitude = (whole & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : magnitude;
            out[i] = (uint16_t)((magnitude | (whole & 0x80000000u)) >> 16);
        }
        return;
    }
    int8_t *out = (int8_t *)m->values + b->position;
    uint32_t most = 0; /* numbers without a sign are ordered as their bits are */
    for (int i = 0; i < b->count; i++) {
        uint32_t size = to_bits(values[i]) & 0x7FFFFFFFu;
        most = size > most ? size : most;
    }
    const float largest = from_bits(most) < 0x1p-126f ? 0 : from_bits(most);
    m->scales[b->number] = largest;
    const float inverse = largest > 0 ? 1 / largest : 0;
    for (int i = 0; i < b->count; i++) {
        float x = (fabsf(values[i]) * inverse) * (float)(LEVELS * LEVELS);
        float k = floorf(sqrtf(x));
        float above = (x - k * k) * 0x1p16f;
        k = ((float)(int32_t)bits[i] + 0.5f) * (k * 2 + 1) < above ? k + 1 : k;
        k = k > LEVELS ? LEVELS : k;
        out[i] = (int8_t)(int32_t)copysignf(k, values[i]);
    }
}

void ds_optim_load(int64_t n, Momentum m, float *out) {
    for (Block b = {.number = -1}; next_block(&b, n, m.key.start);) load(&m, &b, out + b.position);
}

void ds_optim_store(int64_t n, Momentum m, const float *values) {
    for (Block b = {.number = -1}; next_block(&b, n, m.key.start);) store(&m, &b, values + b.position);
}

/* ------------------------------------------------------------------------------------------------ steps */

static inline void sign_run(int n, float *restrict p, float *restrict m, const float *restrict g, Blend w, float lr,
                            float factor) {
    for (int i = 0; i < n; i++) {
        float c = g[i] * w.d1 + m[i] * w.d0;
        m[i] = m[i] * w.k0 + g[i] * w.k1;
        p[i] = p[i] * factor - lr * sign_of(c);
    }
}

/* p <- factor p - lr sign(d0 m + d1 g); m <- k0 m + k1 g */
void ds_optim_sign_step(int64_t n, float *restrict p, Momentum m, const float *restrict g, Blend w, float lr,
                        float factor) {
    if (m.kind == NONE) {
        for (int64_t i = 0; i < n; i++) p[i] = p[i] * factor - lr * sign_of(g[i] * w.d1);
        return;
    }
    if (m.kind == FLOAT32) {
        float *restrict values = m.values;
        for (int64_t i = 0; i < n; i++) {
            float c = g[i] * w.d1 + values[i] * w.d0;
            values[i] = values[i] * w.k0 + g[i] * w.k1;
            p[i] = p[i] * factor - lr * sign_of(c);
        }
        return;
    }
    float wide[BLOCK];
    for (Block b = {.number = -1}; next_block(&b, n, m.key.start);) {
        load(&m, &b, wide);
        sign_run(b.count, p + b.position, wide, g + b.position, w, lr, factor);
        store(&m, &b, wide);
    }
}

/* The sum of squares in fp64, in LANES partial sums. */
double ds_optim_square_sum(int64_t n, const float *restrict values) {
    double sums[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += (double)values[i + j] * (double)values[i + j];
    for (; i < n; i++) sums[0] += (double)values[i] * (double)values[i];
    for (int width = LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) sums[j] += sums[j + width];
    return sums[0];
}

static inline uint16_t nearest_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

static inline void blend_run(int n, float *restrict c, float *restrict m, const float *restrict g, Blend w) {
    for (int i = 0; i < n; i++) {
        c[i] = g[i] * w.d1 + m[i] * w.d0;
        m[i] = m[i] * w.k0 + g[i] * w.k1;
    }
}

/* out <- d0 m + d1 g, fp32 or rounded to bfloat16; m <- k0 m + k1 g unless it is only read */
void ds_optim_blend_into(int64_t n, void *out, int out_kind, Momentum m, const float *restrict g, Blend w,
                         int writable) {
    float wide[BLOCK], c[BLOCK];
    Block b = {.number = -1};
    while (next_block(&b, n, m.key.start)) {
        const float *gradient = g + b.position;
        if (m.kind == NONE) {
            for (int i = 0; i < b.count; i++) c[i] = gradient[i] * w.d1;
        } else if (m.kind == FLOAT32) {
            blend_run(b.count, c, (float *)m.values + b.position, gradient, w);
        } else {
            load(&m, &b, wide);
            blend_run(b.count, c, wide, gradient, w);
            if (writable) store(&m, &b, wide);
        }
        if (out_kind == FLOAT32) {
            memcpy((float *)out + b.position, c, (size_t)b.count * sizeof(float));
        } else {
            uint16_t *narrow = (uint16_t *)out + b.position;
            for (int i = 0; i < b.count; i++) narrow[i] = nearest_bfloat16(c[i]);
        }
    }
}

/* p <- factor p - rate update */
void ds_optim_apply_update(int64_t n, float *restrict p, const void *update, int kind, float rate, float factor) {
    if (kind == FLOAT32) {
        const float *restrict values = update;
        for (int64_t i = 0; i < n; i++) p[i] = p[i] * factor - values[i] * rate;
    } else if (kind == BFLOAT16) {
        const uint16_t *restrict values = update;
        for (int64_t i = 0; i < n; i++) p[i] = p[i] * factor - from_bits((uint32_t)values[i] << 16) * rate;
    } else {
        const int8_t *restrict values = update;
        for (int64_t i = 0; i < n; i++) p[i] = p[i] * factor - (float)values[i] * rate;
    }
}
