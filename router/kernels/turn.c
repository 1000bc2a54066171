// What happens to queries, keys and values between their projection and attention: rotation, norm and temperature, each
// rounded to bfloat16 as the reference does, and the keys' and values' way into the store. D in steps of 32.
//
// Letters: T tokens, N query heads, G key/value heads, D head dimension; a token's heads are N queries, G keys, G values.
#include <math.h>
#include <omp.h>
#include <string.h>

#include "vector.h"

enum { TOKENS_WORTH_A_THREAD = 16 };

// Pairs (x[2i], x[2i + 1]) as complex numbers times `turn`, D / 2 of (cos, sin).
static void rotate(bf16 *head, const float *turn, long D) {
    const __m512i swapped = _mm512_set_epi32(14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1);
    for (long d = 0; d < D; d += 16) {
        __m512 x = load(head + d), t = _mm512_loadu_ps(turn + d);
        __m512 cosine = _mm512_moveldup_ps(t), sine = _mm512_movehdup_ps(t);
        // Even places: x cos − y sin; odd ones: y cos + x sin.
        store(head + d, _mm512_fmaddsub_ps(x, cosine, _mm512_mul_ps(_mm512_permutexvar_ps(swapped, x), sine)));
    }
}

static void norm(bf16 *head, long D, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (long d = 0; d < D; d += 16) squares = _mm512_fmadd_ps(load(head + d), load(head + d), squares);
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)D + eps));
    for (long d = 0; d < D; d += 16) store(head + d, _mm512_mul_ps(load(head + d), scale));
}

static void warm(bf16 *head, long D, float temperature) {
    for (long d = 0; d < D; d += 16) store(head + d, _mm512_mul_ps(load(head + d), _mm512_set1_ps(temperature)));
}

// Changes queries in place. `turns` [T, D / 2] of (cos, sin) or NULL; eps < 0: no norm; `temperatures` [T] or NULL.
void herd_turn(bf16 *heads, const float *turns, float eps, const float *temperatures, bf16 *keys, bf16 *values,
               const long *slots, long T, long N, long G, long D, int threads) {
    if (T < TOKENS_WORTH_A_THREAD) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long t = 0; t < T; t++) {
        bf16 *own = heads + t * (N + 2 * G) * D;
        for (long n = 0; n < N + G; n++) {
            if (turns) rotate(own + n * D, turns + t * D, D);
            if (eps >= 0) norm(own + n * D, D, eps);
            if (temperatures && n < N) warm(own + n * D, D, temperatures[t]);
        }
        memcpy(keys + slots[t] * G * D, own + N * D, G * D * sizeof(bf16));
        memcpy(values + slots[t] * G * D, own + (N + G) * D, G * D * sizeof(bf16));
    }
}
