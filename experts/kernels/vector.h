// Vectors of 16 floats and their bfloat16 forms.
#pragma once
#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;

static inline void store(bf16 *to, __m512 v) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(v)); }

static inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

static inline __m512 load(const bf16 *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }

static inline float one(bf16 v) {
    union { uint32_t bits; float number; } u = {.bits = (uint32_t)v << 16};
    return u.number;
}

static inline bf16 rounded_one(float v) { return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(v)), 0); }

// As a bfloat16 would have it.
static inline __m512 rounded(__m512 v) { return widen((__m256i)_mm512_cvtneps_pbh(v)); }

// e^v as 2^n · e^f with f within ln 2 / 2 of zero and a polynomial for e^f (Cephes' expf); relative error below 2e-7.
static inline __m512 exp512(__m512 v) {
    // Of two operands one of which is no number, the second is taken: v stays what it is.
    v = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), v));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504089f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), v);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
    const float terms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    __m512 p = _mm512_set1_ps(terms[0]);
    for (int i = 1; i < 6; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(terms[i]));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(f, f), p, f), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

#define LOG2_E 1.44269504f

// 2^v for v <= 0 or little above; relative error below 3e-6, where shares are rounded to 2e-3.
static inline __m512 exp2_512(__m512 v) {
    __m512 f = _mm512_reduce_ps(v, 1);  // v - floor(v)
    __m512 p = _mm512_set1_ps(1.35341676e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.20114613e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.41442756e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93003835e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(p, v);
}

// Row by row the sum, or the largest, of the lanes of 16 vectors; with `largest` a constant.
static inline __attribute__((always_inline)) __m512 across(const __m512 *v, const int largest) {
#define JOIN(a, b) (largest ? _mm512_max_ps(a, b) : _mm512_add_ps(a, b))
    __m512 pairs[8], fours[4];
    for (int i = 0; i < 8; i++)
        pairs[i] = JOIN(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = JOIN(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 left = JOIN(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    __m512 right = JOIN(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88), _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return JOIN(_mm512_shuffle_f32x4(left, right, 0x88), _mm512_shuffle_f32x4(left, right, 0xdd));
#undef JOIN
}
