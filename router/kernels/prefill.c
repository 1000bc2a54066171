// Causal attention of many queries per sequence over keys and values that stay where they are: [slots, G, D] in bfloat16, in
// runs of consecutive slots. For CPUs with AVX512-BF16, by AMX tiles where there are any.
//
// A thread takes some queries of one sequence and group at a time and goes over all keys that they see, block by block: packs
// the block as its products need it, then scores, shares and mixtures of 32 queries after 32. Sums are in float32, only shares
// are rounded before they meet the values; their order is that of the keys, whoever computes them.
//
// Letters: N query heads, G key/value heads, D head dimension in steps of 32, R = N / G. A column is one query of one head: the
// heads of a group see the same keys, so column p · R + r is head r of a span's token p.
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "scratch.h"
#include "tiles.h"
#include "vector.h"

enum {
    MANY = 2 * SIDE,       // rows and columns of one product
    KEYS = 256,            // of a block
    LEAD = KEYS + SIDE,    // floats from one row of scores to the next; rows a power of two apart evict each other
    MAX_D = 256,
    MAX_COLUMNS = 512,     // that share the packing of a block
    ITEMS_PER_THREAD = 4,
};

typedef struct {
    const bf16 *query;
    long query_stride;
    bf16 *out;
    const bf16 *keys, *values;
    const long *rows, *counts, *starts, *lengths, *first;
    long N, G, D, R;
} Call;

// `columns` columns of one span and group from `column` on, which see `keys` keys at most.
typedef struct { long span, group, column, columns, past, keys; } Item;

// What a thread works on.
typedef struct {
    bf16 *queries;           // [columns, D]
    float *mixed;            // [columns, D]
    float *largest, *total;  // [columns]
    char *keys;              // tiles [key / SIDE][d / STEP] of pairs of d
    char *values;            // tiles [key / STEP][d / SIDE] of pairs of keys
    float *scores;           // [MANY, LEAD]; shares take their place
} Work;

// ---- products

// Tiles: at + k * step + n * next are those of inputs k · STEP … and columns n · SIDE ….
typedef struct { const char *at; long step, next; } Packed;

// MANY rows and MANY columns of c = a b or, with `add`, c += a b, over `steps` · STEP inputs.

#ifdef __AMX_BF16__

static inline void multiply(const bf16 *a, long a_row, Packed b, long steps, float *c, long c_row, int add) {
    long wide = a_row * sizeof(bf16), lead = c_row * sizeof(float);
    if (add) {
        _tile_loadd(0, c, lead); _tile_loadd(1, c + SIDE, lead);
        _tile_loadd(2, c + SIDE * c_row, lead); _tile_loadd(3, c + SIDE * c_row + SIDE, lead);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (long k = 0; k < steps; k++) {
        _tile_loadd(4, a + k * STEP, wide);
        _tile_loadd(6, b.at + k * b.step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b.at + k * b.step + b.next, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + SIDE * a_row + k * STEP, wide);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, lead); _tile_stored(1, c + SIDE, lead);
    _tile_stored(2, c + SIDE * c_row, lead); _tile_stored(3, c + SIDE * c_row + SIDE, lead);
}

#else

static void multiply(const bf16 *a, long a_row, Packed b, long steps, float *c, long c_row, int add) {
    enum { M = 8 };
    for (long m = 0; m < MANY; m += M, a += M * a_row, c += M * c_row) {
        __m512 left[M], right[M];
        for (int i = 0; i < M; i++) {
            left[i] = add ? _mm512_loadu_ps(c + i * c_row) : _mm512_setzero_ps();
            right[i] = add ? _mm512_loadu_ps(c + i * c_row + SIDE) : _mm512_setzero_ps();
        }
        for (long k = 0; k < steps; k++)
            for (long pair = 0; pair < SIDE; pair++) {
                const char *at = b.at + k * b.step + pair * 64;
                __m512bh b0 = (__m512bh)_mm512_loadu_si512(at), b1 = (__m512bh)_mm512_loadu_si512(at + b.next);
                for (int i = 0; i < M; i++) {
                    int two;
                    memcpy(&two, a + i * a_row + k * STEP + 2 * pair, sizeof(two));
                    left[i] = _mm512_dpbf16_ps(left[i], (__m512bh)_mm512_set1_epi32(two), b0);
                    right[i] = _mm512_dpbf16_ps(right[i], (__m512bh)_mm512_set1_epi32(two), b1);
                }
            }
        for (int i = 0; i < M; i++) {
            _mm512_storeu_ps(c + i * c_row, left[i]);
            _mm512_storeu_ps(c + i * c_row + SIDE, right[i]);
        }
    }
}

#endif

// ---- packing

static void pack_keys(const bf16 *const *rows, long count, long D, char *tiles) {
    for (long key = 0; key < count; key += SIDE)
        for (long d = 0; d < D; d += STEP, tiles += TILE) {
            __m512i v[SIDE];
            for (int i = 0; i < SIDE; i++) v[i] = _mm512_loadu_si512(rows[key + i] + d);
            transpose(v);
            for (int i = 0; i < SIDE; i++) _mm512_store_si512(tiles + i * 64, v[i]);
        }
}

static void pack_values(const bf16 *const *rows, long count, long D, char *tiles) {
    for (long key = 0; key < count; key += STEP, tiles += D / SIDE * TILE)
        for (long pair = 0; pair < SIDE; pair++) interleave(rows[key + 2 * pair], rows[key + 2 * pair + 1], D, tiles + pair * 64);
}

// ---- scores to shares

// Scores of keys from `seen` on become -inf.
static void hide(float *scores, long seen, long count) {
    for (long j = seen < 0 ? 0 : seen / SIDE * SIDE; j < count; j += SIDE) {
        __mmask16 there = seen > j ? (__mmask16)((1u << (seen - j)) - 1) : 0;
        _mm512_mask_storeu_ps(scores + j, (__mmask16)~there, _mm512_set1_ps(-INFINITY));
    }
}

static __m512 largest_of(const float *scores, long count) {
    __m512 even = _mm512_loadu_ps(scores), odd = _mm512_loadu_ps(scores + SIDE);
    for (long j = MANY; j < count; j += MANY) {
        even = _mm512_max_ps(even, _mm512_loadu_ps(scores + j));
        odd = _mm512_max_ps(odd, _mm512_loadu_ps(scores + j + SIDE));
    }
    return _mm512_max_ps(even, odd);
}

// Shares in place of the scores; returns their sum, in lanes.
static __m512 weigh(float *scores, long count, float scale, float offset) {
    __m512 scales = _mm512_set1_ps(scale), offsets = _mm512_set1_ps(offset), even = _mm512_setzero_ps(), odd = even;
    bf16 *shares = (bf16 *)scores;
    for (long j = 0; j < count; j += MANY) {
        __m512 a = exp2_512(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), scales, offsets));
        __m512 b = exp2_512(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j + SIDE), scales, offsets));
        even = _mm512_add_ps(even, a);
        odd = _mm512_add_ps(odd, b);
        _mm512_storeu_si512(shares + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    return _mm512_add_ps(even, odd);
}

// The same for SIDE rows, `largest` and `total` being of all keys so far; what those mixed is to be multiplied by `keep`.
// Returns which rows that changes.
static __mmask16 weigh_rows(float *scores, long count, float scale, float *largest, float *total, float *keep) {
    __m512 lanes[SIDE];
    for (int i = 0; i < SIDE; i++) lanes[i] = largest_of(scores + i * LEAD, count);
    __m512 before = _mm512_loadu_ps(largest), now = _mm512_max_ps(before, across(lanes, 1)), scales = _mm512_set1_ps(scale);
    __mmask16 moved = _mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ);
    __m512 kept = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), moved, exp2_512(_mm512_mul_ps(_mm512_sub_ps(before, now), scales)));
    float offsets[SIDE];
    _mm512_storeu_ps(offsets, _mm512_mul_ps(now, scales));
    for (int i = 0; i < SIDE; i++) lanes[i] = weigh(scores + i * LEAD, count, scale, offsets[i]);
    _mm512_storeu_ps(largest, now);
    _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(total), kept, across(lanes, 0)));
    _mm512_storeu_ps(keep, kept);
    return moved;
}

static void rescale(float *mixed, __mmask16 moved, const float *keep, long D) {
    for (unsigned left = moved; left; left &= left - 1) {
        long i = __builtin_ctz(left);
        for (long d = 0; d < D; d += SIDE)
            _mm512_storeu_ps(mixed + i * D + d, _mm512_mul_ps(_mm512_loadu_ps(mixed + i * D + d), _mm512_set1_ps(keep[i])));
    }
}

// ---- one item

// How many keys a column of the item sees.
static long seen_by(const Call *call, const Item *item, long c) { return item->past + (item->column + c) / call->R + 1; }

// Take in the `count` packed keys from `key` on for MANY columns from `c` on.
static void take(const Call *call, const Item *item, const Work *work, long c, long key, long count) {
    long D = call->D, wide = D / STEP * TILE;
    float scale = LOG2_E / sqrtf((float)D);
    for (long j = 0; j < count; j += MANY)
        multiply(work->queries + c * D, D, (Packed){work->keys + j / SIDE * wide, TILE, wide}, D / STEP, work->scores + j, LEAD,
                 0);
    for (long i = 0; i < MANY; i++) {
        long seen = seen_by(call, item, c + i) - key;
        if (seen >= count) break;
        hide(work->scores + i * LEAD, seen, count);
    }
    for (long i = 0; i < MANY; i += SIDE) {
        float keep[SIDE];
        __mmask16 moved = weigh_rows(work->scores + i * LEAD, count, scale, work->largest + c + i, work->total + c + i, keep);
        rescale(work->mixed + (c + i) * D, moved, keep, D);
    }
    for (long d = 0; d < D; d += MANY)
        multiply((const bf16 *)work->scores, 2 * LEAD, (Packed){work->values + d / SIDE * TILE, 2 * wide, TILE}, count / STEP,
                 work->mixed + c * D + d, D, 1);
}

static void start(const Call *call, const Item *item, const Work *work, long room) {
    long D = call->D, R = call->R;
    for (long c = 0; c < room; c++) {
        long column = item->column + c;
        const bf16 *token = call->query + (call->rows[item->span] + column / R) * call->query_stride;
        if (c < item->columns) memcpy(work->queries + c * D, token + (item->group * R + column % R) * D, D * sizeof(bf16));
        else memset(work->queries + c * D, 0, D * sizeof(bf16));
        work->largest[c] = -INFINITY;
        work->total[c] = 0.0f;
    }
    memset(work->mixed, 0, room * D * sizeof(float));
}

static void finish(const Call *call, const Item *item, const Work *work) {
    long D = call->D, R = call->R;
    for (long c = 0; c < item->columns; c++) {
        long column = item->column + c;
        bf16 *to = call->out + ((call->rows[item->span] + column / R) * call->N + item->group * R + column % R) * D;
        __m512 total = _mm512_set1_ps(1.0f / work->total[c]);
        for (long d = 0; d < D; d += SIDE) store(to + d, _mm512_mul_ps(_mm512_loadu_ps(work->mixed + c * D + d), total));
    }
}

static void attend(const Call *call, const Item *item, const Work *work) {
    static const bf16 zeros[MAX_D];
    long D = call->D, room = (item->columns + MANY - 1) / MANY * MANY, run = call->first[item->span], at = 0;
    const bf16 *keys[KEYS], *values[KEYS];
    start(call, item, work, room);
    for (long key = 0; key < item->keys; key += KEYS) {
        long count = item->keys - key < KEYS ? item->keys - key : KEYS, padded = (count + MANY - 1) / MANY * MANY;
        for (long j = 0; j < count; j++, at++) {
            for (; at == call->lengths[run]; run++) at = 0;
            long offset = ((call->starts[run] + at) * call->G + item->group) * D;
            keys[j] = call->keys + offset;
            values[j] = call->values + offset;
        }
        for (long j = count; j < padded; j++) keys[j] = values[j] = zeros;
        pack_keys(keys, padded, D, work->keys);
        pack_values(values, padded, D, work->values);
        for (long c = 0; c < room; c += MANY) {
            long last = c + MANY < item->columns ? c + MANY - 1 : item->columns - 1;
            long seen = seen_by(call, item, last) - key, needed = (seen + MANY - 1) / MANY * MANY;
            if (seen > 0) take(call, item, work, c, key, needed < padded ? needed : padded);
        }
    }
    finish(call, item, work);
}

// ---- all items

static Work work_of(long columns, long D) {
    long row = D * sizeof(bf16), sums = D * sizeof(float);
    long queries = columns * row, mixed = columns * sums, block = KEYS * row, scores = MANY * LEAD * sizeof(float);
    char *at = scratch(0, queries + mixed + 2 * columns * sizeof(float) + 2 * block + scores);
    Work work = {.queries = (bf16 *)at, .mixed = (float *)(at + queries)};
    at += queries + mixed;
    work.keys = at;
    work.values = at + block;
    work.scores = (float *)(at + 2 * block);
    work.largest = work.scores + MANY * LEAD;
    work.total = work.largest + columns;
    return work;
}

static int by_keys(const void *left, const void *right) {
    long l = ((const Item *)left)->keys, r = ((const Item *)right)->keys;
    return (l < r) - (l > r);
}

static long num_items(const Call *call, long spans, long columns) {
    long total = 0;
    for (long s = 0; s < spans; s++) total += (call->counts[s] * call->R + columns - 1) / columns * call->G;
    return total;
}

static void list_items(const Call *call, long spans, long columns, Item *items) {
    for (long s = 0; s < spans; s++) {
        long all = call->counts[s] * call->R, past = -call->counts[s];
        for (long run = call->first[s]; run < call->first[s + 1]; run++) past += call->lengths[run];
        for (long column = 0; column < all; column += columns)
            for (long g = 0; g < call->G; g++) {
                long here = all - column < columns ? all - column : columns;
                *items++ = (Item){s, g, column, here, past, past + (column + here - 1) / call->R + 1};
            }
    }
}

int herd_prepare(void) { return prepare(); }

// query: row t at query + t * query_stride, [N, D]; out: [T, N, D]. Span s has counts[s] rows from rows[s] on and runs
// first[s] … first[s + 1] − 1, run i being `lengths[i]` slots from `starts[i]` on; the last counts[s] slots are its own rows'.
void herd_prefill(const bf16 *query, long query_stride, bf16 *out, const bf16 *keys, const bf16 *values, const long *rows,
                  const long *counts, const long *starts, const long *lengths, const long *first, long spans, long N, long G,
                  long D, int threads) {
    Call call = {query, query_stride, out, keys, values, rows, counts, starts, lengths, first, N, G, D, N / G};
    long columns = MAX_COLUMNS;
    while (columns > MANY && num_items(&call, spans, columns) < ITEMS_PER_THREAD * threads) columns /= 2;
    long all = num_items(&call, spans, columns);
    Item *items = (Item *)scratch(1, all * sizeof(Item));
    list_items(&call, spans, columns, items);
    qsort(items, all, sizeof(Item), by_keys);  // Long ones first, lest one is left to a single thread.
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Work work = work_of(columns, D);
        begin();
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < all; i++) attend(&call, &items[i], &work);
        end();
    }
}
