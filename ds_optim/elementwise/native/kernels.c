/* One pass over memory for the steps that every rule ends in. "key" and bits: see common.h. */
#include "codecs.h"
#include "common.h"
#include "kernels.h"
#include "noise.h"

/* What the blocks of some arrays are cut by: the place of the first element in its parameter. */
static inline uint64_t start_of(const Array *a, const Array *b) {
    return a->kind == BFLOAT16 || a->kind == INT8 ? a->key.start : b->key.start;
}

void ds_optim_load(int64_t n, Array a, float *out) {
    for (Block b = {.number = -1}; next_block(&b, n, a.key.start);) load(&a, &b, out + b.position);
}

void ds_optim_store(int64_t n, Array a, const float *values) {
    const Rounds rounds = rounding_of(&a);
    for (Block b = {.number = -1}; next_block(&b, n, a.key.start);) store(&a, &b, &rounds, values + b.position);
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

/* A block of weights and of a gradient in fp32, and of momentum as it is stored. */
static inline void sign_block(const Block *b, float *p, const Array *m, const float *g, Blend w, float lr, float factor,
                              const Rounds *rounds) {
#ifdef WIDE_VECTORS
    if (b->count == BLOCK && !signbit(lr) && (m->kind == BFLOAT16 || m->kind == INT8)) {
        if (m->kind == BFLOAT16) {
            uint16_t *values = (uint16_t *)m->values + b->position;
            look_ahead(values);
            wide_sign_bfloat16(p, values, g, w, lr, factor, rounds, b->begin);
        } else {
            int8_t *codes = (int8_t *)m->values + b->position;
            float *scale = m->scales + b->number;
            look_ahead(codes);
            *scale = wide_sign_int8(p, codes, *scale, g, w, lr, factor, rounds, b->begin);
        }
        return;
    }
#endif
    float scratch[BLOCK];
    float *momentum = load(m, b, scratch);
    sign_run(b->count, p, momentum, g, w, lr, factor);
    store(m, b, rounds, momentum);
}

/* p <- factor p - lr sign(d0 m + d1 g); m <- k0 m + k1 g */
void ds_optim_sign_step(int64_t n, Array p, Array m, Array g, Blend w, float lr, float factor) {
    const Rounds of_p = rounding_of(&p), of_m = rounding_of(&m);
    float scratch_p[BLOCK], scratch_g[BLOCK];
    for (Block b = {.number = -1}; next_block(&b, n, start_of(&p, &m));) {
        const float *gradient = load(&g, &b, scratch_g);
        float *weights = load(&p, &b, scratch_p);
        if (m.kind == NONE) {
            for (int i = 0; i < b.count; i++) weights[i] = weights[i] * factor - lr * sign_of(gradient[i] * w.d1);
        } else {
            sign_block(&b, weights, &m, gradient, w, lr, factor, &of_m);
        }
        store(&p, &b, &of_p, weights);
    }
}

static inline void blend_run(int n, float *restrict c, float *restrict m, const float *restrict g, Blend w) {
    for (int i = 0; i < n; i++) {
        c[i] = g[i] * w.d1 + m[i] * w.d0;
        m[i] = m[i] * w.k0 + g[i] * w.k1;
    }
}

/* out <- d0 m + d1 g, fp32 or rounded to bfloat16; m <- k0 m + k1 g unless it is only read */
void ds_optim_blend_into(int64_t n, Array out, Array m, Array g, Blend w, int writable) {
    const Rounds of_m = rounding_of(&m);
    float scratch_m[BLOCK], scratch_g[BLOCK], c[BLOCK];
    for (Block b = {.number = -1}; next_block(&b, n, m.key.start);) {
        const float *gradient = load(&g, &b, scratch_g);
        if (m.kind == NONE) {
            for (int i = 0; i < b.count; i++) c[i] = gradient[i] * w.d1;
        } else {
            float *momentum = load(&m, &b, scratch_m);
            blend_run(b.count, c, momentum, gradient, w);
            if (writable) store(&m, &b, &of_m, momentum);
        }
        if (out.kind == FLOAT32) {
            memcpy((float *)out.values + b.position, c, (size_t)b.count * sizeof(float));
        } else {
            uint16_t *narrow = (uint16_t *)out.values + b.position;
            for (int i = 0; i < b.count; i++) narrow[i] = nearest_bfloat16(c[i]);
        }
    }
}

/* p <- factor p - rate update; an update in int8 has no scales: its codes are the values */
void ds_optim_apply_update(int64_t n, Array p, Array update, float rate, float factor) {
    const Rounds of_p = rounding_of(&p);
    float scratch_p[BLOCK], scratch_u[BLOCK];
    for (Block b = {.number = -1}; next_block(&b, n, p.key.start);) {
        const float *values = scratch_u;
        if (update.kind == INT8)
            for (int i = 0; i < b.count; i++) scratch_u[i] = (float)((const int8_t *)update.values)[b.position + i];
        else
            values = load(&update, &b, scratch_u);
        float *weights = load(&p, &b, scratch_p);
        for (int i = 0; i < b.count; i++) weights[i] = weights[i] * factor - values[i] * rate;
        store(&p, &b, &of_p, weights);
    }
}

static inline void adamw_run(int n, float *restrict p, float *restrict m, float *restrict v, const float *restrict g,
                             Adam a) {
    for (int i = 0; i < n; i++) {
        m[i] = m[i] * a.b1 + g[i] * a.one_less_b1;
        v[i] = v[i] * a.b2 + (g[i] * g[i]) * a.one_less_b2;
        p[i] = p[i] * a.factor - (m[i] / (sqrtf(v[i]) / a.correction + a.eps)) * a.rate;
    }
}

/* m, v: fp32 */
void ds_optim_adamw_step(int64_t n, Array p, Array m, Array v, Array g, Adam a) {
    const Rounds of_p = rounding_of(&p);
    float scratch_p[BLOCK], scratch_g[BLOCK];
    for (Block b = {.number = -1}; next_block(&b, n, p.key.start);) {
        const float *gradient = load(&g, &b, scratch_g);
        float *weights = load(&p, &b, scratch_p);
        adamw_run(b.count, weights, load(&m, &b, NULL), load(&v, &b, NULL), gradient, a);
        store(&p, &b, &of_p, weights);
    }
}
