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

static inline void advance(int n, float *restrict m, float *restrict root, const float *restrict g, Moments w) {
    for (int i = 0; i < n; i++) m[i] = m[i] * w.k0 + g[i] * w.k1;
    for (int i = 0; i < n; i++) root[i] = next_root(root[i], g[i], w.beta, w.rest);
}

static inline float ratio(float m, float root, Moments w) { return (m / w.mean) / (root / w.deviation + (float)w.eps); }

static inline float lamb_update(float p, float m, float root, Moments w, float decay, int decays) {
    const float update = ratio(m, root, w);
    return decays ? update + p * decay : update;
}

/* v <- beta v + rest (g - m)^2; m <- k0 m + k1 g / (1 + sqrt(v)); p <- factor p - lr sign(m) */
void ds_optim_lasm_element_step(int64_t n, float *restrict p, float *restrict m, float *restrict root,
                                const float *restrict g, Moments w, float lr, float factor) {
    for (int64_t begin = 0; begin < n; begin += RUN) {
        const int64_t end = at_most(n, begin + RUN);
        for (int64_t i = begin; i < end; i++) root[i] = next_root(root[i], g[i] - m[i], w.beta, w.rest);
        for (int64_t i = begin; i < end; i++) {
            m[i] = m[i] * w.k0 + (g[i] / (root[i] + 1)) * w.k1;
            p[i] = p[i] * factor - lr * sign_of(m[i]);
        }
    }
}

/* The sum of (g - m)^2. */
void ds_optim_lasm_difference(int64_t n, const float *restrict m, const float *restrict g, double *out) {
    float c[RUN];
    for (int64_t part = 0; part < n; part += PART) {
        double sums[LANES] = {0};
        const int64_t end = at_most(n, part + PART);
        for (int64_t i = part; i < end; i += RUN) {
            const int count = (int)at_most(end - i, RUN);
            for (int j = 0; j < count; j++) c[j] = g[i + j] - m[i + j];
            add_squares(sums, count, c);
        }
        *out++ = total(sums);
    }
}

/* m and root move on; the sums of p^2 and r^2. */
void ds_optim_lamb_measure(int64_t n, const float *restrict p, float *restrict m, float *restrict root,
                           const float *restrict g, Moments w, float decay, int decays, double *out) {
    float update[RUN];
    for (int64_t part = 0; part < n; part += PART) {
        double of_p[LANES] = {0}, of_update[LANES] = {0};
        const int64_t end = at_most(n, part + PART);
        for (int64_t i = part; i < end; i += RUN) {
            const int count = (int)at_most(end - i, RUN);
            advance(count, m + i, root + i, g + i, w);
            for (int j = 0; j < count; j++)
                update[j] = lamb_update(p[i + j], m[i + j], root[i + j], w, decay, decays);
            add_squares(of_p, count, p + i);
            add_squares(of_update, count, update);
        }
        *out++ = total(of_p);
        *out++ = total(of_update);
    }
}

/* p <- p - lr r */
void ds_optim_lamb_step(int64_t n, float *restrict p, const float *restrict m, const float *restrict root, Moments w,
                        float lr, float decay, int decays) {
    for (int64_t i = 0; i < n; i++) p[i] -= lamb_update(p[i], m[i], root[i], w, decay, decays) * lr;
}

/* m and root move on; the sum of (g / max(sqrt(v_hat), eps))^2, of which NaN stays NaN. */
void ds_optim_stable_measure(int64_t n, float *restrict m, float *restrict root, const float *restrict g, Moments w,
                             double *out) {
    for (int64_t part = 0; part < n; part += PART) {
        double sums[LANES] = {0};
        const int64_t end = at_most(n, part + PART);
        for (int64_t i = part; i < end; i += RUN) {
            const int count = (int)at_most(end - i, RUN);
            advance(count, m + i, root + i, g + i, w);
            double ratios[RUN] = {0};
            for (int j = 0; j < count; j++) {
                const double size = root[i + j] / w.deviation;
                ratios[j] = g[i + j] / (size < w.eps ? w.eps : size);
            }
            for (int k = 0; k < RUN; k += LANES)
                for (int j = 0; j < LANES; j++) sums[j] += ratios[k + j] * ratios[k + j];
        }
        *out++ = total(sums);
    }
}

/* p <- factor p - lr m_hat / (sqrt(v_hat) + eps) */
void ds_optim_stable_step(int64_t n, float *restrict p, const float *restrict m, const float *restrict root, Moments w,
                          float lr, float factor) {
    for (int64_t i = 0; i < n; i++) p[i] = p[i] * factor - ratio(m[i], root[i], w) * lr;
}
