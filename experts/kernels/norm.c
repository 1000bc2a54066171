// Root-mean-square norm of bfloat16 rows: statistics in float32, rounded before the product with the weight, as the
// reference does. H in steps of 16.
#include <math.h>
#include <omp.h>

#include "vector.h"

enum { ROWS_WORTH_A_THREAD = 16 };

void herd_norm(const bf16 *x, const bf16 *weight, bf16 *y, long T, long H, float eps, int threads) {
    if (T < ROWS_WORTH_A_THREAD) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long t = 0; t < T; t++) {
        const bf16 *from = x + t * H;
        __m512 squares = _mm512_setzero_ps();
        for (long h = 0; h < H; h += 16) squares = _mm512_fmadd_ps(load(from + h), load(from + h), squares);
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)H + eps));
        for (long h = 0; h < H; h += 16)
            store(y + t * H + h, _mm512_mul_ps(rounded(_mm512_mul_ps(load(from + h), scale)), load(weight + h)));
    }
}
