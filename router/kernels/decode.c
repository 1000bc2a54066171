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

enum { BLOCK = 16, MAX_R = 16, MAX_D = 256, AT_ONCE = 4 };

typedef struct {
    float largest, total;
    float mixed[MAX_D];
} Head;

// Vector of the sums of 16 vectors.
static __m512 sums(const __m512 *v) {
    __m512 pairs[8], fours[4];
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 left = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    __m512 right = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88), _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(left, right, 0x88), _mm512_shuffle_f32x4(left, right, 0xdd));
}

// Products of one query with `count` <= BLOCK keys.
static __m512 scores(const bf16 *query, const bf16 *keys, long count, long stride, long D) {
    __m512 sum[BLOCK];
    for (int j = 0; j < BLOCK; j++) sum[j] = _mm512_setzero_ps();
    for (long d = 0; d < D; d += 32) {
        __m512bh q = (__m512bh)_mm512_loadu_si512(query + d);
        if (count == BLOCK)
            for (int j = 0; j < BLOCK; j++) sum[j] = _mm512_dpbf16_ps(sum[j], q, (__m512bh)_mm512_loadu_si512(keys + j * stride + d));
        else
            for (int j = 0; j < count; j++) sum[j] = _mm512_dpbf16_ps(sum[j], q, (__m512bh)_mm512_loadu_si512(keys + j * stride + d));
    }
    return sums(sum);
}

// Shares of the keys by their scores; what there was before is to be multiplied by `keep`.
static void weigh(Head *head, __m512 score, long count, float *shares, float *keep) {
    __mmask16 there = (__mmask16)((1u << count) - 1);
    float largest = fmaxf(head->largest, _mm512_mask_reduce_max_ps(there, score));
    __m512 share = _mm512_maskz_mov_ps(there, exp512(_mm512_sub_ps(score, _mm512_set1_ps(largest))));
    *keep = head->total > 0 ? expf(head->largest - largest) : 0.0f;
    head->largest = largest;
    head->total = head->total * *keep + _mm512_reduce_add_ps(share);
    _mm512_storeu_ps(shares, share);
}

// Add the values, by their shares, to the mixtures of `num` heads.
static inline __attribute__((always_inline)) void mix(Head *heads, const float (*shares)[BLOCK], const float *keep,
                                                      const bf16 *values, long count, long stride, long D, const int num) {
    for (long d = 0; d < D; d += 32) {
        __m512 low[num], high[num];
        for (int r = 0; r < num; r++) {
            low[r] = _mm512_mul_ps(_mm512_loadu_ps(heads[r].mixed + d), _mm512_set1_ps(keep[r]));
            high[r] = _mm512_mul_ps(_mm512_loadu_ps(heads[r].mixed + d + 16), _mm512_set1_ps(keep[r]));
        }
        for (long j = 0; j < count; j++) {
            __m512 a = load(values + j * stride + d), b = load(values + j * stride + d + 16);
            for (int r = 0; r < num; r++) {
                low[r] = _mm512_fmadd_ps(_mm512_set1_ps(shares[r][j]), a, low[r]);
                high[r] = _mm512_fmadd_ps(_mm512_set1_ps(shares[r][j]), b, high[r]);
            }
        }
        for (int r = 0; r < num; r++) {
            _mm512_storeu_ps(heads[r].mixed + d, low[r]);
            _mm512_storeu_ps(heads[r].mixed + d + 16, high[r]);
        }
    }
}

// Take in `count` <= BLOCK keys and values for all R heads.
static void take(Head *heads, const bf16 *queries, long R, const bf16 *keys, const bf16 *values, long count, long stride, long D,
                 float scale) {
    for (long j = 0; j < count; j++)  // What comes next is on its way while this is computed.
        for (long d = 0; d < D; d += 32) {
            _mm_prefetch((const char *)(keys + (BLOCK + j) * stride + d), _MM_HINT_T0);
            _mm_prefetch((const char *)(values + (BLOCK + j) * stride + d), _MM_HINT_T0);
        }
    float shares[AT_ONCE][BLOCK], keep[AT_ONCE];
    for (long first = 0; first < R; first += AT_ONCE) {
        int num = R - first < AT_ONCE ? R - first : AT_ONCE;
        for (int r = 0; r < num; r++) {
            __m512 score = _mm512_mul_ps(scores(queries + (first + r) * D, keys, count, stride, D), _mm512_set1_ps(scale));
            weigh(&heads[first + r], score, count, shares[r], &keep[r]);
        }
        Head *these = heads + first;
        switch (num) {
            case 1: mix(these, shares, keep, values, count, stride, D, 1); break;
            case 2: mix(these, shares, keep, values, count, stride, D, 2); break;
            case 3: mix(these, shares, keep, values, count, stride, D, 3); break;
            default: mix(these, shares, keep, values, count, stride, D, 4);
        }
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
                take(heads, asks, R, keys + at, values + at, count, stride, D, scale);
            }
        bf16 *to = out + (b * N + g * R) * D;
        for (long r = 0; r < R; r++)
            for (long d = 0; d < D; d += 16)
                store(to + r * D + d, _mm512_div_ps(_mm512_loadu_ps(heads[r].mixed + d), _mm512_set1_ps(heads[r].total)));
    }
}
