/* One pass over memory for the sign rules that ask something of each element, or of a whole parameter, before they step.
 *
 * Each operation is rounded by itself and no two are contracted into one, so that every result has the bits of the
 * eager path (sign_rules.py, blend.py, noise.py), which says what the formulas are. Arrays of (n,), which do not overlap;
 * "out" takes a number for each part (parts.h), "factor" is that of the decay.
 */
#include "parts.h"

static inline float direction(float m, float g, Blend w) { return g * w.d1 + m * w.d0; }

static inline float next(float m, float g, Blend w) { return m * w.k0 + g * w.k1; }

/* ------------------------------------------------------------------------------------ what is measured */

void ds_optim_agreement(int64_t n, const float *restrict m, const float *restrict g, Blend w, double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        const int64_t end = at_most(n, part + PART);
        int32_t count = 0;
        for (int64_t i = part; i < end; i++) {
            const float c = direction(m[i], g[i], w);
            count += ((c > 0) & (g[i] > 0)) | ((c < 0) & (g[i] < 0));
        }
        *out++ = count;
    }
}

void ds_optim_count_from(int64_t n, const float *restrict m, const float *restrict g, Blend w, float nu, double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        const int64_t end = at_most(n, part + PART);
        int32_t count = 0;
        for (int64_t i = part; i < end; i++) count += fabsf(direction(m[i], g[i], w)) >= nu;
        *out++ = count;
    }
}

/* NaN where there is one, as of any minimum here and of any maximum. */
void ds_optim_smallest_nonzero(int64_t n, const float *restrict m, const float *restrict g, Blend w, double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        const int64_t end = at_most(n, part + PART);
        uint32_t least = 0x7F800000u - 1, most = 0; /* of zero, one less wraps around to the largest there is */
        for (int64_t i = part; i < end; i++) {
            const uint32_t size = size_bits(direction(m[i], g[i], w)), less = size - 1;
            least = less < least ? less : least;
            most = size > most ? size : most;
        }
        *out++ = from_bits(most > 0x7F800000u ? most : least + 1);
    }
}

/* m moves on; the largest |m|. */
void ds_optim_move_momentum(int64_t n, float *restrict m, const float *restrict g, Blend w, double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        const int64_t end = at_most(n, part + PART);
        uint32_t most = 0;
        for (int64_t i = part; i < end; i++) {
            m[i] = next(m[i], g[i], w);
            const uint32_t size = size_bits(m[i]);
            most = size > most ? size : most;
        }
        *out++ = from_bits(most);
    }
}

void ds_optim_square_sums(int64_t n, const float *restrict values, double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        double sums[LANES] = {0};
        add_squares(sums, (int)at_most(n - part, PART), values + part);
        *out++ = total(sums);
    }
}

OF_RUN void direction_run(int n, const float *restrict m, const float *restrict g, Blend w, double sums[LANES]) {
    float c[RUN];
    for (int i = 0; i < n; i++) c[i] = direction(m[i], g[i], w);
    add_squares(sums, n, c);
}

void ds_optim_direction_squares(int64_t n, const float *restrict m, const float *restrict g, Blend w, double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        double sums[LANES] = {0};
        const int64_t end = at_most(n, part + PART);
        int64_t i = part;
        for (; i + RUN <= end; i += RUN) direction_run(RUN, m + i, g + i, w, sums);
        direction_run((int)(end - i), m + i, g + i, w, sums);
        *out++ = total(sums);
    }
}

/* ------------------------------------------------------------------------------------------------ steps */

void ds_optim_cautious_step(int64_t n, float *restrict p, float *restrict m, const float *restrict g, Blend w, float lr,
                            float factor) {
    for (int64_t i = 0; i < n; i++) {
        const float u = sign_of(direction(m[i], g[i], w));
        const float agrees = (float)(u * g[i] > 0);
        m[i] = next(m[i], g[i], w);
        p[i] = p[i] * factor - lr * (u * agrees);
    }
}

void ds_optim_gated_step(int64_t n, float *restrict p, float *restrict m, const float *restrict g, Blend w, float lr,
                         float factor, float nu) {
    for (int64_t i = 0; i < n; i++) {
        const float c = direction(m[i], g[i], w);
        const float below = (float)(fabsf(c) < nu);
        const float h = sign_of(c) * (1 - below) + c * below;
        m[i] = next(m[i], g[i], w);
        p[i] = p[i] * factor - h * lr;
    }
}

void ds_optim_raw_step(int64_t n, float *restrict p, float *restrict m, const float *restrict g, Blend w, float lr,
                       float factor) {
    for (int64_t i = 0; i < n; i++) {
        const float c = direction(m[i], g[i], w);
        m[i] = next(m[i], g[i], w);
        p[i] = p[i] * factor - c * lr;
    }
}

/* ------------------------------------------------------------------------------------------------ noise */

/* Lanes of 64 bits, a word of 32 in the low half of each; what stands in the high half does not matter. */
typedef uint64_t Wide __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Signed __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
enum { WIDTH = 8, VECTORS = 8, GROUP = WIDTH * VECTORS };
enum { NOISE = 4 * GROUP }; /* long enough for what was stored to have left for the cache before it is loaded */

typedef struct {
    Wide k0[ROUNDS], k1[ROUNDS]; /* the keys of each round, in all lanes */
    uint64_t step;
} Schedule;

static Schedule schedule_of(Key key) {
    Schedule s = {.step = key.step};
    for (uint32_t round = 0; round < ROUNDS; round++) {
        s.k0[round] = (Wide){0} + (uint32_t)((uint32_t)key.seed + round * 0x9E3779B9u);
        s.k1[round] = (Wide){0} + (uint32_t)((uint32_t)key.stream + round * 0xBB67AE85u);
    }
    return s;
}

static inline Wide product(Wide a, uint32_t b) {
#ifdef WIDE_VECTORS
    return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); /* compilers do not see that 64 x 64 is too much */
#else
    return (a & 0xFFFFFFFFu) * b;
#endif
}

/* (w + 1/2) / 2^31 - 1 of the first words w of Philox4x32-7 of GROUP counters (step, first ...). It is exact
 * before it is rounded to fp32: w - 2^31 is the word as a signed number once its first bit is turned over. */
static inline void uniform_group(float noise[GROUP], uint64_t first, const Schedule *s) {
    const Wide ramp = {0, 1, 2, 3, 4, 5, 6, 7};
    const uint64_t p = (s->step & 0xFFFFFFFFu) * 0xD2511F53u; /* alike for all: the first round has one product less */
    Wide c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
        const Wide element = ramp + (first + (uint64_t)(v * WIDTH)), q = product(element, 0xCD9E8D57u);
        c0[v] = (q >> 32) ^ (s->step >> 32) ^ s->k0[0];
        c1[v] = q;
        c2[v] = (element >> 32) ^ (p >> 32) ^ s->k1[0];
        c3[v] = (Wide){0} + p;
    }
#pragma GCC unroll 7
    for (int round = 1; round < ROUNDS; round++) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            const Wide a = product(c0[v], 0xD2511F53u), b = product(c2[v], 0xCD9E8D57u);
            c0[v] = (b >> 32) ^ c1[v] ^ s->k0[round];
            c1[v] = b;
            c2[v] = (a >> 32) ^ c3[v] ^ s->k1[round];
            c3[v] = a;
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
        const Signed word = (Signed)(__builtin_convertvector(c0[v], Words) ^ 0x80000000u);
        const Floats found = __builtin_convertvector(__builtin_convertvector(word, Doubles) + 0.5, Floats) * 0x1p-31f;
        memcpy(noise + v * WIDTH, &found, sizeof found);
    }
}

static inline void uniform_run(float noise[NOISE], uint64_t first, const Schedule *s) {
    for (int i = 0; i < NOISE; i += GROUP) uniform_group(noise + i, first + (uint64_t)i, s);
}

OF_RUN void stochastic_run(int n, float *restrict p, const float *restrict m, float bound, float lr, float factor,
                           uint64_t first, const Schedule *schedule) {
    float noise[NOISE];
    uniform_run(noise, first, schedule);
    for (int i = 0; i < n; i++) p[i] = p[i] * factor - lr * sign_of(noise[i] * bound + m[i]);
}

/* p <- factor p - lr sign(m + bound noise) */
void ds_optim_stochastic_sign_step(int64_t n, float *restrict p, const float *restrict m, float bound, float lr,
                                   float factor, Key key) {
    const Schedule schedule = schedule_of(key);
    int64_t i = 0;
    for (; i + NOISE <= n; i += NOISE)
        stochastic_run(NOISE, p + i, m + i, bound, lr, factor, key.start + (uint64_t)i, &schedule);
    if (i < n) stochastic_run((int)(n - i), p + i, m + i, bound, lr, factor, key.start + (uint64_t)i, &schedule);
}

OF_RUN void element_run(int n, float *restrict p, float *restrict m, float *restrict bounds, const float *restrict g,
                        Blend w, float lr, float factor, uint64_t first, const Schedule *schedule) {
    float noise[NOISE];
    uniform_run(noise, first, schedule);
    for (int i = 0; i < n; i++) {
        const float momentum = next(m[i], g[i], w), size = fabsf(momentum), old = bounds[i];
        const float limit = size <= old || old != old ? old : size; /* NaN where either is */
        m[i] = momentum;
        bounds[i] = limit;
        p[i] = p[i] * factor - lr * sign_of(noise[i] * limit + momentum);
    }
}

/* The same after m has moved on and each bound has been raised to |m|. */
void ds_optim_stochastic_element_step(int64_t n, float *restrict p, float *restrict m, float *restrict bounds,
                                      const float *restrict g, Blend w, float lr, float factor, Key key) {
    const Schedule schedule = schedule_of(key);
    int64_t i = 0;
    for (; i + NOISE <= n; i += NOISE)
        element_run(NOISE, p + i, m + i, bounds + i, g + i, w, lr, factor, key.start + (uint64_t)i, &schedule);
    if (i < n)
        element_run((int)(n - i), p + i, m + i, bounds + i, g + i, w, lr, factor, key.start + (uint64_t)i, &schedule);
}
