// Attention of one query per sequence over keys and values that stay where they are: [slots, G, D] in bfloat16, in runs of
// consecutive slots. For CPUs with AVX512-BF16, by AMX tiles where there are any.
//
// The query heads that share keys go together, so that keys and values are read once. Sums are in float32 and their order
// is that of the keys.
//
// Letters: B sequences, N query heads, G key/value heads, D head dimension in steps of 32, R = N / G.
#include <math.h>
#include <omp.h>
#include <string.h>

#include "tiles.h"
#include "vector.h"

enum { MAX_R = 16, MAX_D = 256 };

// R heads of one group, and what they have seen so far.
typedef struct {
    const bf16 *queries;  // [R, D]
    long R, D;
    float scale;
    float largest[MAX_R], total[MAX_R], mixed[MAX_R][MAX_D];
    char tiles[MAX_D / STEP * TILE] __attribute__((aligned(64)));  // queries in the order of AMX
} Heads;

#ifdef __AMX_BF16__

// Heads are columns: scores [keys, heads] come out with heads in the lanes of vectors, whatever R is.
enum { BLOCK = 64 };

// [D / STEP][pair of d][head]; heads that are not there are zeros.
static void pack(Heads *heads) {
    for (long d = 0; d < heads->D; d += STEP) {
        __m512i v[SIDE];
        for (long r = 0; r < SIDE; r++)
            v[r] = r < heads->R ? _mm512_loadu_si512(heads->queries + r * heads->D + d) : _mm512_setzero_si512();
        transpose(v);
        for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(heads->tiles + d / STEP * TILE + i * 64, v[i]);
    }
}

// What comes next is on its way while this is computed, some at a time: whoever waits for too much holds up what is there.
static inline void ask_for(const bf16 *rows, long count, long stride, long D) {
    for (long j = 0; j < count; j++)
        for (long d = 0; d < D; d += STEP) _mm_prefetch((const char *)(rows + j * stride + d), _MM_HINT_T1);
}

static void score(const Heads *heads, const bf16 *keys, long count, long stride, float (*scores)[SIDE]) {
    long D = heads->D;
    bf16 some[SIDE * MAX_D];
    for (long j = 0; j < count; j += SIDE) {
        const bf16 *rows = keys + j * stride;
        long lead = stride;
        if (count - j < SIDE) {  // There may be no memory beyond the last key.
            memset(some, 0, sizeof(some));
            for (long i = 0; i < count - j; i++) memcpy(some + i * D, rows + i * stride, D * sizeof(bf16));
            rows = some;
            lead = D;
        }
        _tile_zero(0);
        for (long d = 0; d < D; d += STEP) {
            _tile_loadd(1, rows + d, lead * sizeof(bf16));
            _tile_loadd(2, heads->tiles + d / STEP * TILE, 64);
            _tile_dpbf16ps(0, 1, 2);
            ask_for(keys + (BLOCK + j) * stride + d, SIDE, stride, STEP);
        }
        _tile_stored(0, scores[j], 64);
    }
}

// What the heads mixed before is scaled by `keep`.
static void rescale(Heads *heads, __mmask16 moved, __m512 keep) {
    float factors[SIDE];
    _mm512_storeu_ps(factors, keep);
    for (long r = 0; r < heads->R; r++) {
        float *mixed = heads->mixed[r];
        if (moved >> r & 1)
            for (long d = 0; d < heads->D; d += SIDE)
                _mm512_storeu_ps(mixed + d, _mm512_mul_ps(_mm512_loadu_ps(mixed + d), _mm512_set1_ps(factors[r])));
    }
}

// Shares [head, key] by the scores. `values` are those of these keys.
static void weigh(Heads *heads, float (*scores)[SIDE], long count, bf16 (*shares)[BLOCK], const bf16 *values, long stride) {
    __m512 before = _mm512_loadu_ps(heads->largest), now = before, scale = _mm512_set1_ps(heads->scale);
    for (long j = 0; j < count; j++) now = _mm512_max_ps(now, _mm512_loadu_ps(scores[j]));
    __mmask16 moved = _mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ);
    __m512 keep = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), moved, exp2_512(_mm512_mul_ps(_mm512_sub_ps(before, now), scale)));
    __m512 offset = _mm512_mul_ps(now, scale), sum = _mm512_setzero_ps();
    for (long j = 0; j < count; j += STEP) {
        __m512 v[STEP];
        for (int i = 0; i < STEP; i++) {
            v[i] = j + i < count ? exp2_512(_mm512_fmsub_ps(_mm512_loadu_ps(scores[j + i]), scale, offset)) : _mm512_setzero_ps();
            sum = _mm512_add_ps(sum, v[i]);
            ask_for(values + (BLOCK + j + i) * stride, 1, stride, heads->D);
        }
        transpose((__m512i *)v);
        transpose((__m512i *)(v + SIDE));
        for (int r = 0; r < SIDE; r++) _mm512_storeu_si512(shares[r] + j, (__m512i)_mm512_cvtne2ps_pbh(v[SIDE + r], v[r]));
    }
    _mm512_storeu_ps(heads->largest, now);
    _mm512_storeu_ps(heads->total, _mm512_fmadd_ps(_mm512_loadu_ps(heads->total), keep, sum));
    rescale(heads, moved, keep);
}

// Values to the tiles [STEP keys][SIDE d][pair of keys][d]; keys that are not there are zeros.
static void pair_up(const bf16 *values, long count, long stride, long D, char *tiles) {
    static const bf16 zeros[MAX_D];
    long wide = D / SIDE * TILE;
    for (long j = 0; j < (count + STEP - 1) / STEP * STEP; j += 2) {
        const bf16 *even = j < count ? values + j * stride : zeros, *odd = j + 1 < count ? values + (j + 1) * stride : zeros;
        interleave(even, odd, D, tiles + j / STEP * wide + j % STEP / 2 * 64);
    }
}

// Add the values, by their shares, to the mixtures.
static void mix(Heads *heads, bf16 (*shares)[BLOCK], const char *tiles, long count) {
    long D = heads->D, wide = D / SIDE * TILE;
    for (long d = 0; d < D; d += 2 * SIDE) {
        const char *columns = tiles + d / SIDE * TILE;
        _tile_loadd(0, heads->mixed[0] + d, sizeof(heads->mixed[0]));
        _tile_loadd(1, heads->mixed[0] + d + SIDE, sizeof(heads->mixed[0]));
        for (long j = 0; j < count; j += STEP) {
            _tile_loadd(2, shares[0] + j, sizeof(shares[0]));
            _tile_loadd(3, columns + j / STEP * wide, 64);
            _tile_loadd(4, columns + j / STEP * wide + TILE, 64);
            _tile_dpbf16ps(0, 2, 3);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, heads->mixed[0] + d, sizeof(heads->mixed[0]));
        _tile_stored(1, heads->mixed[0] + d + SIDE, sizeof(heads->mixed[0]));
    }
}

// Take in `count` <= BLOCK keys and values.
static void take(Heads *heads, const bf16 *keys, const bf16 *values, long count, long stride) {
    float scores[BLOCK][SIDE] __attribute__((aligned(64)));
    bf16 shares[SIDE][BLOCK] __attribute__((aligned(64)));
    char tiles[BLOCK / STEP * MAX_D / SIDE * TILE] __attribute__((aligned(64)));
    pair_up(values, count, stride, heads->D, tiles);  // First of all, since tiles are slow to load what was stored just now.
    score(heads, keys, count, stride, scores);
    weigh(heads, scores, count, shares, values, stride);
    mix(heads, shares, tiles, count);
}

#else

enum { BLOCK = 16, AT_ONCE = 4 };

static void pack(Heads *heads) { (void)heads; }

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
    return across(sum, 0);
}

// Shares of the keys by their scores; what there was before is to be multiplied by `keep`.
static void weigh(Heads *heads, long r, __m512 score, long count, float *shares, float *keep) {
    __mmask16 there = (__mmask16)((1u << count) - 1);
    float before = heads->largest[r], now = fmaxf(before, _mm512_mask_reduce_max_ps(there, score));
    __m512 above = _mm512_mul_ps(_mm512_sub_ps(score, _mm512_set1_ps(now)), _mm512_set1_ps(heads->scale));
    __m512 share = _mm512_maskz_mov_ps(there, exp2_512(above));
    *keep = heads->total[r] > 0 ? exp2f((before - now) * heads->scale) : 0.0f;
    heads->largest[r] = now;
    heads->total[r] = heads->total[r] * *keep + _mm512_reduce_add_ps(share);
    _mm512_storeu_ps(shares, share);
}

// Add the values, by their shares, to the mixtures of `num` heads from `first` on.
static inline __attribute__((always_inline)) void mix(Heads *heads, long first, const float (*shares)[BLOCK], const float *keep,
                                                      const bf16 *values, long count, long stride, const int num) {
    long D = heads->D;
    for (long d = 0; d < D; d += 32) {
        __m512 low[num], high[num];
        for (int r = 0; r < num; r++) {
            low[r] = _mm512_mul_ps(_mm512_loadu_ps(heads->mixed[first + r] + d), _mm512_set1_ps(keep[r]));
            high[r] = _mm512_mul_ps(_mm512_loadu_ps(heads->mixed[first + r] + d + 16), _mm512_set1_ps(keep[r]));
        }
        for (long j = 0; j < count; j++) {
            __m512 a = load(values + j * stride + d), b = load(values + j * stride + d + 16);
            for (int r = 0; r < num; r++) {
                low[r] = _mm512_fmadd_ps(_mm512_set1_ps(shares[r][j]), a, low[r]);
                high[r] = _mm512_fmadd_ps(_mm512_set1_ps(shares[r][j]), b, high[r]);
            }
        }
        for (int r = 0; r < num; r++) {
            _mm512_storeu_ps(heads->mixed[first + r] + d, low[r]);
            _mm512_storeu_ps(heads->mixed[first + r] + d + 16, high[r]);
        }
    }
}

// Take in `count` <= BLOCK keys and values.
static void take(Heads *heads, const bf16 *keys, const bf16 *values, long count, long stride) {
    long D = heads->D;
    for (long j = 0; j < count; j++)  // What comes next is on its way while this is computed.
        for (long d = 0; d < D; d += STEP) {
            _mm_prefetch((const char *)(keys + (BLOCK + j) * stride + d), _MM_HINT_T0);
            _mm_prefetch((const char *)(values + (BLOCK + j) * stride + d), _MM_HINT_T0);
        }
    float shares[AT_ONCE][BLOCK], keep[AT_ONCE];
    for (long first = 0; first < heads->R; first += AT_ONCE) {
        int num = heads->R - first < AT_ONCE ? heads->R - first : AT_ONCE;
        for (int r = 0; r < num; r++)
            weigh(heads, first + r, scores(heads->queries + (first + r) * D, keys, count, stride, D), count, shares[r], &keep[r]);
        switch (num) {
            case 1: mix(heads, first, shares, keep, values, count, stride, 1); break;
            case 2: mix(heads, first, shares, keep, values, count, stride, 2); break;
            case 3: mix(heads, first, shares, keep, values, count, stride, 3); break;
            default: mix(heads, first, shares, keep, values, count, stride, 4);
        }
    }
}

#endif

int herd_prepare(void) { return prepare(); }

// query: row b at query + b * query_stride, [N, D]; out: [B, N, D]. Sequence b has runs first[b] … first[b + 1] − 1, run i
// being `lengths[i]` slots from `starts[i]` on.
void herd_decode(const bf16 *query, long query_stride, bf16 *out, const bf16 *keys, const bf16 *values, const long *starts,
                 const long *lengths, const long *first, long B, long N, long G, long D, int threads) {
    long R = N / G, stride = G * D;
#pragma omp parallel num_threads(threads)
    {
        begin();
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < B * G; item++) {
            long b = item / G, g = item % G;
            Heads heads = {.queries = query + b * query_stride + g * R * D, .R = R, .D = D, .scale = LOG2_E / sqrtf((float)D)};
            for (long r = 0; r < MAX_R; r++) heads.largest[r] = -INFINITY;
            pack(&heads);
            for (long run = first[b]; run < first[b + 1]; run++)
                for (long j = 0; j < lengths[run]; j += BLOCK) {
                    long count = lengths[run] - j < BLOCK ? lengths[run] - j : BLOCK, at = (starts[run] + j) * stride + g * D;
                    take(&heads, keys + at, values + at, count, stride);
                }
            bf16 *to = out + (b * N + g * R) * D;
            for (long r = 0; r < R; r++)
                for (long d = 0; d < D; d += SIDE)
                    store(to + r * D + d, _mm512_div_ps(_mm512_loadu_ps(heads.mixed[r] + d), _mm512_set1_ps(heads.total[r])));
        }
        end();
    }
}
