/* NF4 on the CPU: the same numbers as reference.py, bit for bit, at memory bandwidth.
 *
 * cpu.py compiles it once for the user's processor; it is called without the interpreter's lock.
 * A block of numbers has 16 possible values: its magnitude times each of the 16 codes, rounded to the wanted type. These
 * are computed once per block; each number is then a look-up, one instruction for 16 or 32 numbers with AVX-512.
 *
 * Products must not be fused with sums (-ffp-contract=off): the results would differ in the last bit.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "../threads.h"
#include "simd.h"

enum { NESTED = 256 };

typedef struct {
    const uint8_t *codes; /* two a byte, the first in the high nibble */
    const float *absmax;  /* one a block, or NULL */
    const uint8_t *coded; /* with double quantisation: one byte a block, */
    const float *nested;  /* one for 256 blocks, */
    const float *offset;  /* and one */
    const float *code;    /* the 16 values */
    const float *dynamic; /* the 256 values */
    int64_t block;        /* numbers in a block, even */
} Quantized;

static inline Wide numbers_of(const Quantized *w, int64_t block) {
    if (w->absmax) return scaled(w->code, w->absmax[block]);
    const float product = w->dynamic[w->coded[block]] * w->nested[block / NESTED];
    return scaled(w->code, product + *w->offset);
}

/* --- quantising ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const float *x, *middles; /* the numbers, from the first of a block; the 15 places between two values */
    int64_t n, block;
    uint8_t *codes;
    float *absmax;
} Quantization;

/* The largest magnitude of up to a block of numbers; NaN if one is not finite. */
static float largest_of(const float *x, int64_t n) {
    float lane[16] = {0}, most = 0;
    int bad = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) {
            const float size = fabsf(x[i + j]);
            lane[j] = size > lane[j] ? size : lane[j];
            bad |= !(size <= FLT_MAX);
        }
    for (; i < n; i++) {
        lane[0] = fabsf(x[i]) > lane[0] ? fabsf(x[i]) : lane[0];
        bad |= !(fabsf(x[i]) <= FLT_MAX);
    }
    for (int j = 0; j < 16; j++) most = lane[j] > most ? lane[j] : most;
    return bad ? NAN : most;
}

/* Up to 64 numbers: how many of the middles lie below each. A whole block is multiplied, a short one divided. */
static void code_of(const float *x, int64_t n, const float *middles, float by, int divide, uint8_t *codes) {
    float v[64] = {0};
    int32_t index[64] = {0};
    for (int64_t j = 0; j < n; j++) {
        const float scaled_x = divide ? x[j] / by : x[j] * by;
        v[j] = scaled_x < -1 ? -1 : scaled_x > 1 ? 1 : scaled_x;
    }
    for (int i = 0; i < 15; i++)
        for (int j = 0; j < 64; j++) index[j] += v[j] > middles[i];
    for (int64_t j = 0; j < (n + 1) / 2; j++) codes[j] = (uint8_t)(index[2 * j] << 4 | index[2 * j + 1]);
}

static void quantize_share(const void *given, int64_t first, int64_t last) {
    const Quantization *j = given;
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * j->block, count = smaller(j->block, j->n - start);
        const int divide = count < j->block;
        const float most = largest_of(j->x + start, count), bound = most < 1e-38f ? 1e-38f : most;
        const float by = divide ? bound : 1.0f / bound;
        for (int64_t k = 0; k < count; k += 64)
            code_of(j->x + start + k, smaller(64, count - k), j->middles, by, divide, j->codes + (start + k) / 2);
        j->absmax[block] = divide ? bound : most;
    }
}

/* Codes and magnitudes of n numbers; the magnitude of a block with one that is not finite is NaN. */
void lorary_nf4_quantize(const float *x, int64_t n, int64_t block, const float *middles, uint8_t *codes, float *absmax,
                     int threads) {
    const Quantization job = {x, middles, n, block, codes, absmax};
    split(quantize_share, &job, (n + block - 1) / block, threads);
}

/* --- dequantising ---------------------------------------------------------------------------------------------------- */

/* `count` numbers of one block from place `start`: an odd one first, 32 at a time, and the rest. */
#define PUT(NAME, TYPE, TABLE, PUT32, SPILL)                                                              \
    static inline void NAME(const uint8_t *codes, int64_t start, int64_t count, TABLE t, TYPE *out) {     \
        TYPE each[16];                                                                                    \
        const uint8_t *bytes = codes + start / 2;                                                         \
        if (count % 32 || start % 2) SPILL(t, each);                                                      \
        if (start % 2) *out++ = each[*bytes++ & 15], count--;                                             \
        for (; count >= 32; count -= 32, bytes += 16, out += 32) PUT32(bytes, t, out);                    \
        for (; count >= 2; count -= 2, bytes++) *out++ = each[*bytes >> 4], *out++ = each[*bytes & 15];   \
        if (count) *out = each[*bytes >> 4];                                                              \
    }
PUT(put_floats, float, Wide, put_wide, spill_wide)
PUT(put_halves, uint16_t, Narrow, put_narrow, spill_narrow)

static inline int64_t size_of(int type) { return type == FLOAT32 || type >= WIDE ? 4 : 2; }

/* `count` numbers from index `start` of the flattened weight, across blocks. */
static void dequantize_range(const Quantized *w, int64_t start, int64_t count, int type, char *out) {
    int64_t block = start / w->block, here = smaller(count, (block + 1) * w->block - start);
    for (; count > 0; block++, here = smaller(count, w->block)) { /* `here` lie in this block */
        const Wide t = numbers_of(w, block);
        if (type == FLOAT32) put_floats(w->codes, start, here, t, (float *)(void *)out);
        else if (type >= WIDE) put_floats(w->codes, start, here, rounded(t, type - WIDE), (float *)(void *)out);
        else put_halves(w->codes, start, here, narrow(t, type), (uint16_t *)(void *)out);
        start += here, count -= here, out += here * size_of(type);
    }
}

typedef struct {
    const Quantized *w;
    const int64_t *list;                   /* row indices, or NULL for consecutive rows */
    int64_t start, width, columns, stride; /* a row begins `width` numbers after the one before it, and `stride` in out */
    int type;
    char *out;
} Dequantization;

static void dequantize_share(const void *given, int64_t first, int64_t last) {
    const Dequantization *j = given;
    const int64_t size = size_of(j->type);
    const int one = !j->list && j->columns == j->width && j->stride == j->width; /* one range */
    const int64_t step = one ? last - first : 1, count = one ? step * j->width : j->columns;
    for (int64_t row = first; row < last; row += step) {
        const int64_t place = j->start + (j->list ? j->list[row] : row) * j->width;
        dequantize_range(j->w, place, count, j->type, j->out + row * j->stride * size);
    }
}

/* A rectangle of a matrix of `width` columns: `rows` by `columns` numbers, the first at place `start`; or, of the rows
 * whose numbers are listed, the columns from `start`. */
void lorary_nf4_dequantize(const Quantized *w, const int64_t *list, int64_t start, int64_t rows, int64_t columns,
                       int64_t width, void *out, int64_t stride, int type, int threads) {
    const Dequantization job = {w, list, start, width, columns, stride, type, out};
    split(dequantize_share, &job, rows, threads);
}

/* --- the product with few rows --------------------------------------------------------------------------------------- */

typedef struct {
    const Quantized *w;
    const float *x; /* [tokens, width], in each 32 the even ones first */
    float *y;       /* [tokens, height] */
    int64_t height, width;
    int tokens, type;
} Product;

static inline void dot(const Product *j, int64_t row, int token, const int tokens, const int type) {
    const Quantized *w = j->w;
    const uint8_t *bytes = w->codes + row * (j->width / 2);
    const float *x = j->x + token * j->width;
    const int64_t blocks = j->width / w->block, first = row * blocks;
    Sum a[4], b[4]; /* two chains of sums, so that none waits for the other */
    for (int i = 0; i < tokens; i++) a[i] = b[i] = nothing();
    for (int64_t block = first; block < first + blocks; block++) {
        const Wide t = rounded(numbers_of(w, block), type);
        for (int64_t k = 0; k < w->block; k += 64, bytes += 32, x += 64) {
            add(bytes, t, x, j->width, tokens, a);
            add(bytes + 16, t, x + 32, j->width, tokens, b);
        }
    }
    for (int i = 0; i < tokens; i++) j->y[(token + i) * j->height + row] = total(plus(a[i], b[i]));
}

static inline void dots(const Product *j, int64_t first, int64_t last, const int type) {
    const int rest = j->tokens % 4;
    for (int64_t row = first; row < last; row++) {
        for (int token = 0; token + 4 <= j->tokens; token += 4) dot(j, row, token, 4, type);
        if (rest == 3) dot(j, row, j->tokens - 3, 3, type);
        if (rest == 2) dot(j, row, j->tokens - 2, 2, type);
        if (rest == 1) dot(j, row, j->tokens - 1, 1, type);
    }
}

static void product_share(const void *given, int64_t first, int64_t last) {
    const Product *j = given;
    if (j->type == FLOAT32) dots(j, first, last, FLOAT32);
    else if (j->type == BFLOAT16) dots(j, first, last, BFLOAT16);
    else dots(j, first, last, FLOAT16);
}

/* y = x·Wᵀ summed in 32 bits, W rounded to `type`, for blocks of multiples of 64 that lie within rows.
 * Returns 0, or 1 where there is no memory. */
int lorary_nf4_linear(const Quantized *w, const float *x, float *y, int tokens, int64_t height, int64_t width, int type,
                     int threads) {
    float *arranged = malloc(sizeof(float) * (size_t)tokens * (size_t)width + 1);
    if (!arranged) return 1;
    for (int64_t from = 0; from < tokens * width; from += 32)
        for (int k = 0; k < 16; k++) {
            arranged[from + k] = x[from + 2 * k];
            arranged[from + 16 + k] = x[from + 2 * k + 1];
        }
    const Product job = {w, arranged, y, height, width, tokens, type};
    split(product_share, &job, height, threads);
    free(arranged);
    return 0;
}

const char *lorary_nf4_isa(void) { return ISA; }
