/* What the passes over whole tensors share: runs that stay in the first cache, and sums that no thread count changes.
 *
 * A pass that measures leaves one number for each PART elements, counted from the tensor's first one: whoever calls
 * joins them, in their order, so that the number of threads decides nothing.
 */
#pragma once

#include "common.h"

enum { PART = 1 << 14, RUN = 64 };

/* Of what is done to a run: where its length is RUN the compiler knows it, and a processor, which looks some hundred
 * operations ahead, roots and divides in one loop of a run while it adds up in the next. */
#define OF_RUN static inline __attribute__((always_inline))

/* Of |value|: ordered as the numbers are, with NaN above all. */
static inline uint32_t size_bits(float value) { return to_bits(value) & 0x7FFFFFFFu; }

static inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

/* The squares of (n,) in fp64, to LANES sums. */
OF_RUN void add_squares(double sums[LANES], int n, const float *restrict values) {
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += (double)values[i + j] * (double)values[i + j];
    for (int j = 0; i + j < n; j++) sums[j] += (double)values[i + j] * (double)values[i + j];
}

static inline double total(double sums[LANES]) {
    for (int width = LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) sums[j] += sums[j + width];
    return sums[0];
}
