/* One pass over memory for the rules with a second moment, whose root is kept: LASM by elements, Lamb, StableAdamW.
 *
 * Each operation is rounded by itself and no two are contracted into one, so that every result has the bits of the
 * eager path (moments.py), which says what the formulas are. Arrays of (n,), which do not overlap; "out" takes a row of
 * numbers for each part (parts.h), "factor" is that of the decay.
 */
#include "parts.h"

typedef struct {
    double beta, rest; /* of the second moment: root <- sqrt(beta root^2 + rest x^2), in fp64 */
    double eps;
    float k0, k1;         /* m <- k0 m + k1 g */
    float mean, deviation; /* what m and root are divided by: bias correction */
} Moments;

static inline float next_root(float root, float x, double beta, double rest) {
    const double d = root, e = x;
    return (float)sqrt((d * d) * beta + (e * e) * rest);
}

OF_RUN void advance(int n, float *restrict m, float *restrict root, const float *restrict g, Moments w) {
    for (int i = 0; i < n; i++) m[i] = m[i] * w.k0 + g[i] * w.k1;
    for (int i = 0; i < n; i++) root[i] = next_root(root[i], g[i], w.beta, w.rest);
}

/* After some hundred steps both corrections are 1, and dividing by them changes no bit. */
static inline float ratio(float m, float root, Moments w) {
    if (w.mean == 1 && w.deviation == 1) return m / (root + (float)w.eps);
    return (m / w.mean) / (root / w.deviation + (float)w.eps);
}

static inline float lamb_update(float p, float m, float root, Moments w, float decay) {
    const float update = ratio(m, root, w);
    return decay != 0 ? update + p * decay : update;
}

OF_RUN void lasm_run(int n, float *restrict p, float *restrict m, float *restrict root, const float *restrict g,
                     Moments w, float lr, float factor) {
    for (int i = 0; i < n; i++) root[i] = next_root(root[i], g[i] - m[i], w.beta, w.rest);
    for (int i = 0; i < n; i++) {
        m[i] = m[i] * w.k0 + (g[i] / (root[i] + 1)) * w.k1;
        p[i] = p[i] * factor - lr * sign_of(m[i]);
    }
}

/* v <- beta v + rest (g - m)^2; m <- k0 m + k1 g / (1 + sqrt(v)); p <- factor p - lr sign(m) */
void ds_optim_lasm_element_step(int64_t n, float *restrict p, float *restrict m, float *restrict root,
                                const float *restrict g, Moments w, float lr, float factor) {
    int64_t i = 0;
    for (; i + RUN <= n; i += RUN) lasm_run(RUN, p + i, m + i, root + i, g + i, w, lr, factor);
    lasm_run((int)(n - i), p + i, m + i, root + i, g + i, w, lr, factor);
}

OF_RUN void difference_run(int n, const float *restrict m, const float *restrict g, double sums[LANES]) {
    float c[RUN];
    for (int i = 0; i < n; i++) c[i] = g[i] - m[i];
    add_squares(sums, n, c);
}

/* The sum of (g - m)^2. */
void ds_optim_lasm_difference(int64_t n, const float *restrict m, const float *restrict g, double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        double sums[LANES] = {0};
        const int64_t end = at_most(n, part + PART);
        int64_t i = part;
        for (; i + RUN <= end; i += RUN) difference_run(RUN, m + i, g + i, sums);
        difference_run((int)(end - i), m + i, g + i, sums);
        *out++ = total(sums);
    }
}

OF_RUN void lamb_run(int n, const float *restrict p, float *restrict m, float *restrict root, const float *restrict g,
                     Moments w, float decay, double of_p[LANES], double of_update[LANES]) {
    float update[RUN];
    advance(n, m, root, g, w);
    for (int i = 0; i < n; i++) update[i] = lamb_update(p[i], m[i], root[i], w, decay);
    add_squares(of_p, n, p);
    add_squares(of_update, n, update);
}

/* m and root move on; the sums of p^2 and r^2. */
void ds_optim_lamb_measure(int64_t n, const float *restrict p, float *restrict m, float *restrict root,
                           const float *restrict g, Moments w, float decay, double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        double of_p[LANES] = {0}, of_update[LANES] = {0};
        const int64_t end = at_most(n, part + PART);
        int64_t i = part;
        for (; i + RUN <= end; i += RUN)
            lamb_run(RUN, p + i, m + i, root + i, g + i, w, decay, of_p, of_update);
        lamb_run((int)(end - i), p + i, m + i, root + i, g + i, w, decay, of_p, of_update);
        *out++ = total(of_p);
        *out++ = total(of_update);
    }
}

/* p <- p - lr r */
void ds_optim_lamb_step(int64_t n, float *restrict p, const float *restrict m, const float *restrict root, Moments w,
                        float lr, float decay) {
    for (int64_t i = 0; i < n; i++) p[i] -= lamb_update(p[i], m[i], root[i], w, decay) * lr;
}

OF_RUN void stable_run(int n, float *restrict m, float *restrict root, const float *restrict g, Moments w,
                       double sums[LANES]) {
    double ratios[RUN];
    advance(n, m, root, g, w);
    for (int i = 0; i < n; i++) {
        const double size = root[i] / w.deviation;
        ratios[i] = g[i] / (size < w.eps ? w.eps : size); /* NaN stays NaN */
    }
    for (int i = n; i < RUN; i++) ratios[i] = 0;
    for (int i = 0; i < RUN; i += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += ratios[i + j] * ratios[i + j];
}

/* m and root move on; the sum of (g / max(sqrt(v_hat), eps))^2. */
void ds_optim_stable_measure(int64_t n, float *restrict m, float *restrict root, const float *restrict g, Moments w,
                             double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        double sums[LANES] = {0};
        const int64_t end = at_most(n, part + PART);
        int64_t i = part;
        for (; i + RUN <= end; i += RUN) stable_run(RUN, m + i, root + i, g + i, w, sums);
        stable_run((int)(end - i), m + i, root + i, g + i, w, sums);
        *out++ = total(sums);
    }
}

/* p <- factor p - lr m_hat / (sqrt(v_hat) + eps) */
void ds_optim_stable_step(int64_t n, float *restrict p, const float *restrict m, const float *restrict root, Moments w,
                          float lr, float factor) {
    for (int64_t i = 0; i < n; i++) p[i] = p[i] * factor - ratio(m[i], root[i], w) * lr;
}
