/* The terms of many adapters, each on a few rows:  y = gain * y + w * (b * (B (d * (A x))) + shift).
 *
 * cpu.py compiles it for the user's processor and calls it once for each layer, without the interpreter's lock. An
 * adapter's weights are read where they lie, with its own rank, once for up to four of its rows. Sums are in 32 bits and
 * rounded once. Loops are written for the compiler to vectorise: `rows`, `count` and `type` are constants where they run.
 */
#include <string.h>

#include "../../../kernels/threads.h"

enum { MOST_RANK = 256, ROWS = 4, RANKS = 4, TILE = 64, LINE = 64 };
enum { FLOAT32 = 0, BFLOAT16 = 1 };

typedef struct {
    const void *A, *B, *d, *b, *gain, *shift; /* NULL for a term that the adapter lacks; a gain has 32 bits */
    int64_t rank, A_row, B_row, B_column;     /* strides: A [rank, in], B [out, rank] */
} Terms;

typedef struct {
    int64_t slot, start, stop; /* rows of the adapter in this slot */
    double weight;
} Piece;

typedef struct {
    const Terms *table; /* [slots, layers] */
    int64_t layers, layer;
    const Piece *pieces;
    int64_t count;
    const void *x;
    void *y;
    int64_t in, out;
    int type;
} Job;

#define INLINE static inline __attribute__((always_inline))

INLINE float load(const void *p, int64_t i, const int type) {
    if (type == FLOAT32) return ((const float *)p)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE void store(void *p, int64_t i, float x, const int type) {
    if (type == FLOAT32) {
        ((float *)p)[i] = x;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* ties to even */
    ((uint16_t *)p)[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)nearest;
}

INLINE const void *at(const void *p, int64_t i, const int type) { return (const char *)p + i * (type == FLOAT32 ? 4 : 2); }

/* `count` numbers of A x for each of `rows` rows of x. */
INLINE void products(const void *A, int64_t A_row, const void *x, int64_t in, float (*h)[MOST_RANK], int64_t first,
                     const int rows, const int count, const int type) {
    float sum[ROWS][RANKS] = {{0}};
    for (int64_t c = 0; c < in; c++)
        for (int k = 0; k < count; k++) {
            const float a = load(A, (first + k) * A_row + c, type);
            for (int i = 0; i < rows; i++) sum[i][k] += load(x, i * in + c, type) * a;
        }
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < count; k++) h[i][first + k] = sum[i][k];
}

/* `count` columns of B h for each of `rows` rows. */
INLINE void columns(const Terms *t, float (*h)[MOST_RANK], int64_t first, float (*sum)[TILE], const int rows,
                    const int count, const int type) {
    if (t->B_row == 1) { /* the numbers of a rank lie together */
        for (int64_t j = 0; j < t->rank; j++) {
            const void *b = at(t->B, j * t->B_column + first, type);
            for (int i = 0; i < rows; i++)
                for (int k = 0; k < count; k++) sum[i][k] += h[i][j] * load(b, k, type);
        }
        return;
    }
    for (int k = 0; k < count; k++) {
        const void *b = at(t->B, (first + k) * t->B_row, type);
        float total[ROWS] = {0};
        for (int64_t j = 0; j < t->rank; j++)
            for (int i = 0; i < rows; i++) total[i] += h[i][j] * load(b, j, type);
        for (int i = 0; i < rows; i++) sum[i][k] = total[i];
    }
}

INLINE void tile(const Terms *t, float w, float (*h)[MOST_RANK], void *y, int64_t out, int64_t first, const int rows,
                 const int count, const int type) {
    float sum[ROWS][TILE] = {{0}};
    if (t->rank) columns(t, h, first, sum, rows, count, type);
    for (int i = 0; i < rows; i++) {
        if (t->b)
            for (int k = 0; k < count; k++) sum[i][k] *= load(t->b, first + k, type);
        if (t->shift)
            for (int k = 0; k < count; k++) sum[i][k] += load(t->shift, first + k, type);
        void *row = (void *)at(y, i * out + first, type);
        if (t->gain)
            for (int k = 0; k < count; k++)
                store(row, k, load(row, k, type) * load(t->gain, first + k, FLOAT32) + w * sum[i][k], type);
        else
            for (int k = 0; k < count; k++) store(row, k, load(row, k, type) + w * sum[i][k], type);
    }
}

INLINE void add_terms(const Terms *t, float w, const void *x, void *y, int64_t in, int64_t out, const int rows,
                      const int type) {
    float h[ROWS][MOST_RANK];
    int64_t j = 0, o = 0;
    for (; j + RANKS <= t->rank; j += RANKS) products(t->A, t->A_row, x, in, h, j, rows, RANKS, type);
    for (; j < t->rank; j++) products(t->A, t->A_row, x, in, h, j, rows, 1, type);
    if (t->d)
        for (int i = 0; i < rows; i++)
            for (j = 0; j < t->rank; j++) h[i][j] *= load(t->d, j, type);
    for (; o + TILE <= out; o += TILE) tile(t, w, h, y, out, o, rows, TILE, type);
    for (; o < out; o++) tile(t, w, h, y, out, o, rows, 1, type);
}

/* Weights of many adapters come from memory, not from a cache: a piece's are asked for while the one before computes. */
INLINE void fetch(const Terms *t, int64_t in, int64_t out, const int type) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    if (t->rank && t->A_row == in)
        for (int64_t i = 0; i < t->rank * in * size; i += LINE) __builtin_prefetch((const char *)t->A + i, 0, 2);
    if (t->rank && (t->B_row == 1 ? t->B_column == out : t->B_row == t->rank))
        for (int64_t i = 0; i < t->rank * out * size; i += LINE) __builtin_prefetch((const char *)t->B + i, 0, 2);
}

INLINE void run_pieces(const Job *job, int64_t first, int64_t last, const int type) {
    for (int64_t p = first; p < last; p++) {
        const Piece *piece = job->pieces + p;
        if (p + 1 < last) fetch(job->table + piece[1].slot * job->layers + job->layer, job->in, job->out, type);
        const Terms *t = job->table + piece->slot * job->layers + job->layer;
        if (!t->rank && !t->gain && !t->shift) continue; /* it does not adapt this layer */
        const float w = (float)piece->weight;
        int64_t i = piece->start;
        for (; i + ROWS <= piece->stop; i += ROWS)
            add_terms(t, w, at(job->x, i * job->in, type), (void *)at(job->y, i * job->out, type), job->in, job->out,
                      ROWS, type);
        for (; i < piece->stop; i++)
            add_terms(t, w, at(job->x, i * job->in, type), (void *)at(job->y, i * job->out, type), job->in, job->out, 1,
                      type);
    }
}

/* The pieces of a weighted sum have the same rows, and one thread adds all of them. */
static int64_t boundary(const Job *job, int64_t p) {
    while (p > 0 && p < job->count && job->pieces[p].start == job->pieces[p - 1].start) p++;
    return p;
}

static void share(const void *given, int64_t first, int64_t last) {
    const Job *job = given;
    first = boundary(job, first), last = boundary(job, last);
    if (job->type == FLOAT32) run_pieces(job, first, last, FLOAT32);
    else run_pieces(job, first, last, BFLOAT16);
}

/* Adds the terms of one layer to y [rows, out], for x [rows, in]. */
void lorary_rows(const Terms *table, int64_t layers, int64_t layer, const Piece *pieces, int64_t count, const void *x,
                 void *y, int64_t in, int64_t out, int type, int threads) {
    const Job job = {table, layers, layer, pieces, count, x, y, in, out, type};
    split(share, &job, count, threads);
}
