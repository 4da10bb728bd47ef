/* The steps of kernels.c for many slices of a flat partition in one call: with hundreds of small ones a call of each
 * would take longer than its work. A slice's bits are those of a call of its own. */
#include "kernels.h"

typedef struct {
    int64_t n;
    int64_t place;           /* of its first element in the partition */
    int64_t at;              /* and in what lies beside it: a message, a stack of results */
    int64_t block;           /* its first one, among the partition's */
    uint64_t stream, start;  /* of its noise */
    double scale;            /* of its update */
} Row;

/* The slice of a whole tensor, whose key says seed and step alone. */
static inline Array slice_of(Array a, const Row *r, int64_t place) {
    static const int bytes[] = {[NONE] = 0, [FLOAT32] = 4, [BFLOAT16] = 2, [INT8] = 1};
    a.values = (char *)a.values + place * bytes[a.kind];
    if (a.kind == BFLOAT16 || a.kind == INT8) a.key.stream = r->stream, a.key.start = r->start;
    if (a.kind == INT8) a.scales += r->block;
    return a;
}

#define EACH_ROW for (const Row *r = rows; r < rows + count; r++)
#define OWN(a) slice_of(a, r, r->place)
#define BESIDE(a) slice_of(a, r, r->at)

void ds_optim_sign_steps(int64_t count, const Row *rows, Array p, Array m, Array g, Blend w, float lr, float factor) {
    EACH_ROW ds_optim_sign_step(r->n, OWN(p), OWN(m), BESIDE(g), w, lr, factor);
}

void ds_optim_adamw_steps(int64_t count, const Row *rows, Array p, Array m, Array v, Array g, Adam a) {
    EACH_ROW ds_optim_adamw_step(r->n, OWN(p), OWN(m), OWN(v), BESIDE(g), a);
}

void ds_optim_blends(int64_t count, const Row *rows, Array out, Array m, Array g, Blend w) {
    EACH_ROW ds_optim_blend_into(r->n, BESIDE(out), OWN(m), OWN(g), w, 1);
}

/* rate times each row's scale is rounded once */
void ds_optim_apply_updates(int64_t count, const Row *rows, Array p, Array update, double rate, float factor) {
    EACH_ROW ds_optim_apply_update(r->n, OWN(p), BESIDE(update), (float)(rate * r->scale), factor);
}
