// Attention of one query per sequence over keys and values that stay where they are: [slots, G, D] in bfloat16, in runs of
// consecutive slots. For CPUs with AVX512-BF16.
//
// The query heads that share keys go together, so that keys and values are read once. Sums are in float32 and their order
// is that of the keys.
//
// Letters: B sequences, N query heads, G key/value heads, D head dimension in steps of 32, R = N / G.
#include <math.h>
#include <omp.h>

#include "vector.h"

enum { BLOCK = 16, MAX_R = 16, MAX_D = 256 };

typedef struct {
    float largest, total;
    float mixed[MAX_D];
} Head;

static float dot(const bf16 *a, const bf16 *b, long D) {
    __m512 sum = _mm512_setzero_ps();
    for (long d = 0; d < D; d += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a + d), (__m512bh)_mm512_loadu_si512(b + d));
    return _mm512_reduce_add_ps(sum);
}

// Take in `count` <= BLOCK keys: rescale what there is to the new largest score, add the rest.
static void take(Head *head, const bf16 *query, const bf16 *keys, const bf16 *values, long count, long stride, long D, float scale) {
    float score[BLOCK];
    float largest = head->largest;
    for (long j = 0; j < BLOCK; j++) score[j] = -INFINITY;
    for (long j = 0; j < count; j++) {
        score[j] = dot(query, keys + j * stride, D) * scale;
        if (score[j] > largest) largest = score[j];
    }
    __m512 shares = exp512(_mm512_sub_ps(_mm512_loadu_ps(score), _mm512_set1_ps(largest)));
    shares = _mm512_maskz_mov_ps((__mmask16)((1u << count) - 1), shares);
    float keep = head->total > 0 ? expf(head->largest - largest) : 0.0f;
    head->largest = largest;
    head->total = head->total * keep + _mm512_reduce_add_ps(shares);
    _mm512_storeu_ps(score, shares);
    for (long d = 0; d < D; d += 16) {
        __m512 mixed = _mm512_mul_ps(_mm512_loadu_ps(head->mixed + d), _mm512_set1_ps(keep));
        for (long j = 0; j < count; j++)
            mixed = _mm512_fmadd_ps(_mm512_set1_ps(score[j]), load(values + j * stride + d), mixed);
        _mm512_storeu_ps(head->mixed + d, mixed);
    }
}

// query: row b at query + b * query_stride, [N, D]; out: [B, N, D]. Sequence b has runs first[b] … first[b + 1] − 1, run i
// being `lengths[i]` slots from `starts[i]` on.
void herd_decode(const bf16 *query, long query_stride, bf16 *out, const bf16 *keys, const bf16 *values, const long *starts,
                 const long *lengths, const long *first, long B, long N, long G, long D, int threads) {
    long R = N / G, stride = G * D;
    float scale = 1.0f / sqrtf((float)D);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long item = 0; item < B * G; item++) {
        long b = item / G, g = item % G;
        Head heads[MAX_R];
        for (long r = 0; r < R; r++) {
            heads[r].largest = -INFINITY;
            heads[r].total = 0.0f;
            for (long d = 0; d < D; d++) heads[r].mixed[d] = 0.0f;
        }
        const bf16 *asks = query + b * query_stride + g * R * D;
        for (long run = first[b]; run < first[b + 1]; run++)
            for (long j = 0; j < lengths[run]; j += BLOCK) {
                long count = lengths[run] - j < BLOCK ? lengths[run] - j : BLOCK;
                long at = (starts[run] + j) * stride + g * D;
                for (long r = 0; r < R; r++) take(&heads[r], asks + r * D, keys + at, values + at, count, stride, D, scale);
            }
        bf16 *to = out + (b * N + g * R) * D;
        for (long r = 0; r < R; r++)
            for (long d = 0; d < D; d += 16)
                store(to + r * D + d, _mm512_div_ps(_mm512_loadu_ps(heads[r].mixed + d), _mm512_set1_ps(heads[r].total)));
    }
}
