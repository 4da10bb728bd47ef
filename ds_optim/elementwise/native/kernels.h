/* The steps of one slice that a table of slices is taken through: see kernels.c. */
#pragma once

#include "common.h"

typedef struct {
    float b1, one_less_b1, b2, one_less_b2; /* m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g g */
    float eps, correction, rate, factor;    /* p <- factor p - rate m / (sqrt(v) / correction + eps) */
} Adam;

void ds_optim_sign_step(int64_t n, Array p, Array m, Array g, Blend w, float lr, float factor);
void ds_optim_blend_into(int64_t n, Array out, Array m, Array g, Blend w, int writable);
void ds_optim_apply_update(int64_t n, Array p, Array update, float rate, float factor);
void ds_optim_adamw_step(int64_t n, Array p, Array m, Array v, Array g, Adam a);
