/* SIMD look-ups for nf4.c: the 16 values of a block in registers, and gathering numbers from them.
 *
 *   Wide       the 16 numbers as 32-bit floats        scaled(code, m), rounded(wide, type), spill_wide(wide, array)
 *   Narrow     rounded to a 16-bit type               narrow(wide, type), spill_narrow(narrow, array)
 *   put_wide   32 numbers from 16 bytes               put_narrow likewise
 *   Sum        a sum in several lanes                 nothing(), plus(a, b), total(sum)
 *   add        the product of 32 numbers with rows of x, to a sum for each row
 *
 * Three implementations: AVX-512, AVX2, and plain C.
 */
#include <stdint.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, WIDE = 4 }; /* a 16-bit type + WIDE: rounded to it, but 32 bits */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__F16C__)
#include <immintrin.h>
#define ISA "AVX-512"

typedef __m512 Wide;
typedef __m512i Narrow; /* twice: a look-up of 16 bits takes 5 bits of its lane */

static inline Wide scaled(const float *code, float m) { return _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(m)); }

static inline __m512i to_bfloat16(__m512 x) { /* in the upper half of a lane, the lower half is noise */
    const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

static inline Wide rounded(Wide x, int type) {
    if (type == BFLOAT16)
        return _mm512_castsi512_ps(_mm512_and_si512(to_bfloat16(x), _mm512_set1_epi32((int)0xffff0000u)));
    return type == FLOAT16 ? _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)) : x;
}

static inline Narrow narrow(Wide x, int type) {
    return _mm512_broadcast_i64x4(type == BFLOAT16 ? _mm512_cvtepi32_epi16(_mm512_srli_epi32(to_bfloat16(x), 16))
                                                   : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

static inline void spill_wide(Wide t, float *out) { _mm512_storeu_ps(out, t); }
static inline void spill_narrow(Narrow t, uint16_t *out) {
    _mm256_storeu_si256((__m256i *)(void *)out, _mm512_castsi512_si256(t));
}

static inline __m128i load16(const uint8_t *bytes) { return _mm_loadu_si128((const __m128i *)(const void *)bytes); }

/* A look-up ignores the upper bits of its lane: no masks are needed. */
static inline void put_wide(const uint8_t *bytes, Wide t, float *out) {
    const __m128i both = load16(bytes);
    for (int half = 0; half < 2; half++) {
        const __m512i b = _mm512_cvtepu8_epi64(half ? _mm_unpackhi_epi64(both, both) : both);
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));
        _mm512_storeu_ps(out + 16 * half, _mm512_permutexvar_ps(index, t));
    }
}

static inline void put_narrow(const uint8_t *bytes, Narrow t, uint16_t *out) {
    const __m512i b = _mm512_cvtepu8_epi32(load16(bytes));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
    _mm512_storeu_si512((void *)out, _mm512_permutexvar_epi16(index, t));
}

typedef __m512 Sum;
static inline Sum nothing(void) { return _mm512_setzero_ps(); }
static inline Sum plus(Sum a, Sum b) { return _mm512_add_ps(a, b); }
static inline float total(Sum s) { return _mm512_reduce_add_ps(s); }

/* x: for each row, `stride` apart, the 16 even ones of 32 and then the 16 odd ones. */
static inline void add(const uint8_t *bytes, Wide t, const float *x, int64_t stride, int rows, Sum *s) {
    const __m512i b = _mm512_cvtepu8_epi32(load16(bytes));
    const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), t), odd = _mm512_permutexvar_ps(b, t);
    for (int i = 0; i < rows; i++) {
        s[i] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x + i * stride), s[i]);
        s[i] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + i * stride + 16), s[i]);
    }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define ISA "AVX2"

typedef struct { __m256 low, high; } Wide;
typedef struct { __m128i low, high; } Narrow; /* the low bytes of the 16, and the high ones */

static inline Wide scaled(const float *code, float m) {
    const __m256 factor = _mm256_set1_ps(m);
    return (Wide){_mm256_mul_ps(_mm256_loadu_ps(code), factor), _mm256_mul_ps(_mm256_loadu_ps(code + 8), factor)};
}

static inline __m256i to_bfloat16(__m256 x) { /* in the upper half of a lane, the lower half is noise */
    const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i lost = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), lost);
}

static inline __m256 rounded8(__m256 x, int type) {
    if (type == BFLOAT16)
        return _mm256_castsi256_ps(_mm256_and_si256(to_bfloat16(x), _mm256_set1_epi32((int)0xffff0000u)));
    return type == FLOAT16 ? _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)) : x;
}
static inline Wide rounded(Wide x, int type) { return (Wide){rounded8(x.low, type), rounded8(x.high, type)}; }

static inline __m128i narrow8(__m256 x, int type) {
    if (type == FLOAT16) return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    const __m256i u = _mm256_srli_epi32(to_bfloat16(x), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
}
static inline Narrow narrow(Wide x, int type) {
    const __m128i a = narrow8(x.low, type), b = narrow8(x.high, type), byte = _mm_set1_epi16(255);
    return (Narrow){_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)),
                    _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))};
}

static inline void store16(void *out, __m128i x) { _mm_storeu_si128((__m128i *)out, x); }

static inline void spill_wide(Wide t, float *out) {
    _mm256_storeu_ps(out, t.low);
    _mm256_storeu_ps(out + 8, t.high);
}
static inline void spill_narrow(Narrow t, uint16_t *out) {
    store16(out, _mm_unpacklo_epi8(t.low, t.high));
    store16(out + 8, _mm_unpackhi_epi8(t.low, t.high));
}

static inline __m256 look_up(__m256i index, Wide t) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); /* bit 3 chooses the half */
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), upper);
}

static inline void put_wide(const uint8_t *bytes, Wide t, float *out) {
    for (int part = 0; part < 4; part++) {
        int32_t four;
        memcpy(&four, bytes + 4 * part, 4);
        const __m256i b = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        const __m256i index = _mm256_or_si256(_mm256_srli_epi64(b, 4), _mm256_slli_epi64(b, 32));
        _mm256_storeu_ps(out + 8 * part, look_up(index, t));
    }
}

static inline void put_narrow(const uint8_t *bytes, Narrow t, uint16_t *out) {
    const __m128i c = _mm_loadu_si128((const __m128i *)(const void *)bytes), nibble = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(c, 4), nibble), odd = _mm_and_si128(c, nibble);
    for (int half = 0; half < 2; half++) {
        const __m128i index = half ? _mm_unpackhi_epi8(even, odd) : _mm_unpacklo_epi8(even, odd);
        const __m128i low = _mm_shuffle_epi8(t.low, index), high = _mm_shuffle_epi8(t.high, index);
        store16(out + 16 * half, _mm_unpacklo_epi8(low, high));
        store16(out + 16 * half + 8, _mm_unpackhi_epi8(low, high));
    }
}

typedef __m256 Sum;
static inline Sum nothing(void) { return _mm256_setzero_ps(); }
static inline Sum plus(Sum a, Sum b) { return _mm256_add_ps(a, b); }
static inline float total(Sum s) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

static inline void add(const uint8_t *bytes, Wide t, const float *x, int64_t stride, int rows, Sum *s) {
    for (int half = 0; half < 2; half++) {
        const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(bytes + 8 * half)));
        const __m256 even = look_up(_mm256_srli_epi32(b, 4), t), odd = look_up(b, t);
        for (int i = 0; i < rows; i++) {
            s[i] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x + i * stride + 8 * half), s[i]);
            s[i] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + i * stride + 16 + 8 * half), s[i]);
        }
    }
}

#else
#define ISA "plain C"

typedef struct { float t[16]; } Wide;
typedef struct { uint16_t t[16]; } Narrow;
typedef struct { float lane[16]; } Sum;

static inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline uint16_t to_bfloat16(float x) {
    const uint32_t u = bits_of(x);
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline uint16_t to_float16(float x) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
    if (size > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);  /* NaN */
    if (size >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to infinity */
    if (size < 0x38800000u)                                     /* subnormal: the sum rounds at the right bit */
        return (uint16_t)(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | ((size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13));
}

static inline float from_float16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 1023u;
    if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
    if (exponent) return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
    const float small = (float)fraction * 0x1p-24f;
    return sign ? -small : small;
}

static inline Wide scaled(const float *code, float m) {
    Wide x;
    for (int i = 0; i < 16; i++) x.t[i] = code[i] * m;
    return x;
}
static inline Wide rounded(Wide x, int type) {
    for (int i = 0; i < 16 && type != FLOAT32; i++)
        x.t[i] = type == BFLOAT16 ? float_of((uint32_t)to_bfloat16(x.t[i]) << 16) : from_float16(to_float16(x.t[i]));
    return x;
}
static inline Narrow narrow(Wide x, int type) {
    Narrow y;
    for (int i = 0; i < 16; i++) y.t[i] = type == BFLOAT16 ? to_bfloat16(x.t[i]) : to_float16(x.t[i]);
    return y;
}
static inline void spill_wide(Wide t, float *out) { memcpy(out, t.t, sizeof t.t); }
static inline void spill_narrow(Narrow t, uint16_t *out) { memcpy(out, t.t, sizeof t.t); }

static inline void put_wide(const uint8_t *bytes, Wide t, float *out) {
    for (int i = 0; i < 16; i++) out[2 * i] = t.t[bytes[i] >> 4], out[2 * i + 1] = t.t[bytes[i] & 15];
}
static inline void put_narrow(const uint8_t *bytes, Narrow t, uint16_t *out) {
    for (int i = 0; i < 16; i++) out[2 * i] = t.t[bytes[i] >> 4], out[2 * i + 1] = t.t[bytes[i] & 15];
}

static inline Sum nothing(void) { return (Sum){{0}}; }
static inline Sum plus(Sum a, Sum b) {
    for (int i = 0; i < 16; i++) a.lane[i] += b.lane[i];
    return a;
}
static inline float total(Sum s) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += s.lane[i];
    return sum;
}
static inline void add(const uint8_t *bytes, Wide t, const float *x, int64_t stride, int rows, Sum *s) {
    float even[16], odd[16];
    for (int i = 0; i < 16; i++) even[i] = t.t[bytes[i] >> 4], odd[i] = t.t[bytes[i] & 15];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 16; j++)
            s[i].lane[j] += even[j] * x[i * stride + j] + odd[j] * x[i * stride + 16 + j];
}

#endif
