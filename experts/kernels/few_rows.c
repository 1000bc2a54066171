// Products of few bfloat16 rows with large bfloat16 matrices, for CPUs with AVX512-BF16, by AMX tiles where there are any.
//
// At few rows a product takes as long as its matrix takes to be read from memory, and general kernels reach less than half
// of that. Matrices are [N, K] as they are: nothing is packed twice. Every output element is one sum over ascending k
// that no other row takes part in, so neither the number of rows nor that of threads changes a bit of it.
//
// Letters: M rows, N outputs, K inputs, E experts, F their width, H hidden size.
#include <math.h>
#include <omp.h>
#include <string.h>

#include "scratch.h"
#include "tiles.h"
#include "vector.h"

enum {
    AHEAD = 512,        // bytes of a matrix row that are asked for before they are needed, without AMX
    DEPTH = 8 * STEP,   // inputs that are taken at a time, with AMX: those of some rows fit the innermost cache
    PAIRS = 2,          // pairs of strips that are read side by side: fewer do not hide what tiles take to come back
    WORTH_A_THREAD = 1 << 17,  // elements of a matrix; threads meet too slowly for less
};

typedef struct {
    const bf16 *rows;   // [M, K]
    const char *tiles;  // the same in the order of AMX, [groups, K / STEP] tiles; unused without AMX
    long M, K;
} Input;

typedef float Sums[SIDE][SIDE];   // [output, row]
typedef const bf16 *Pair[2];      // two strips of SIDE outputs each

static long least(long a, long b) { return a < b ? a : b; }

static long groups_of(long M) { return (M + SIDE - 1) / SIDE; }

// ---- sums of pairs of strips and groups of rows

#ifdef __AMX_BF16__

// One group of rows to the tiles [K / STEP][pair of inputs][row]; rows that are not there are zeros.
static void pack_group(const Input *in, long group, char *tiles) {
    long M = least(in->M - group * SIDE, SIDE);
    const bf16 *rows = in->rows + group * SIDE * in->K;
    for (long k = 0; k < in->K; k += STEP, tiles += TILE) {
        __m512i v[SIDE];
        for (long m = 0; m < SIDE; m++) v[m] = m < M ? _mm512_loadu_si512(rows + m * in->K + k) : _mm512_setzero_si512();
        transpose(v);
        for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(tiles + i * 64, v[i]);
    }
}

// Adds what inputs `from` to `to` give for one group of rows or two to sums[strip + 2 * group]. Meanwhile as many inputs
// of what comes `next` (if not NULL) are on their way.
static inline __attribute__((always_inline)) void add(const Input *in, long group, const int two, const Pair w, const bf16 **next,
                                                      long from, long to, Sums *sums) {
    long stride = in->K * sizeof(bf16);
    const char *x0 = in->tiles + (group * in->K + from) / STEP * TILE, *x1 = x0 + in->K / STEP * TILE;
    if (from == 0) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        _tile_loadd(0, sums[0], 64); _tile_loadd(1, sums[1], 64);
        if (two) { _tile_loadd(2, sums[2], 64); _tile_loadd(3, sums[3], 64); }
    }
    for (long k = from; k < to; k += STEP, x0 += TILE, x1 += TILE) {
        for (int i = 0; next && i < SIDE; i++) {
            _mm_prefetch((const char *)(next[0] + i * in->K + k - from), _MM_HINT_T1);
            _mm_prefetch((const char *)(next[1] + i * in->K + k - from), _MM_HINT_T1);
        }
        _tile_loadd(4, w[0] + k, stride);
        _tile_loadd(5, w[1] + k, stride);
        _tile_loadd(6, x0, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
            _tile_loadd(7, x1, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64);
    if (two) { _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64); }
}

// What is read after inputs `from` to `to` of w[pair]: those of the next pair, the next inputs of the first one, or the
// first ones of what comes after all of them.
static int comes_next(const Pair *w, long pair, long pairs, int more, long from, long to, long K, Pair next) {
    long at = pair + 1 < pairs ? from : to < K ? to : 0;
    if (pair + 1 == pairs && to == K && !more) return 0;
    const bf16 *const *of = pair + 1 < pairs ? w[pair + 1] : to < K ? w[0] : w[pairs];
    next[0] = of[0] + at;
    next[1] = of[1] + at;
    return 1;
}

// Sums of all rows with `pairs` pairs of strips: sums[pair][strip + 2 * group]. With `more`, w[pairs] is read afterwards.
static void multiply(const Input *in, const Pair *w, long pairs, int more, Sums *sums) {
    long groups = groups_of(in->M);
    for (long from = 0; from < in->K; from += DEPTH)
        for (long pair = 0, to = least(from + DEPTH, in->K); pair < pairs; pair++) {
            Pair after;
            const bf16 **next = comes_next(w, pair, pairs, more, from, to, in->K, after) ? after : NULL;
            for (long group = 0; group < groups; group += 2, next = NULL) {
                Sums *own = sums + 2 * (pair * groups + group);
                if (group + 1 < groups) add(in, group, 1, w[pair], next, from, to, own);
                else add(in, group, 0, w[pair], next, from, to, own);
            }
        }
}

#else

static void pack_group(const Input *in, long group, char *tiles) { (void)in; (void)group; (void)tiles; }

static inline __attribute__((always_inline)) void dots(const bf16 *x, const bf16 *w, long K, float *out, const int M) {
    __m512 even[M], odd[M];
    for (int m = 0; m < M; m++) even[m] = odd[m] = _mm512_setzero_ps();
    for (long k = 0; k < K; k += STEP) {
        _mm_prefetch((const char *)(w + k) + AHEAD, _MM_HINT_T1);
        _mm_prefetch((const char *)(w + K + k) + AHEAD, _MM_HINT_T1);
        __m512bh a = (__m512bh)_mm512_loadu_si512(w + k), b = (__m512bh)_mm512_loadu_si512(w + K + k);
        for (int m = 0; m < M; m++) {
            __m512bh v = (__m512bh)_mm512_loadu_si512(x + m * K + k);
            even[m] = _mm512_dpbf16_ps(even[m], a, v);
            odd[m] = _mm512_dpbf16_ps(odd[m], b, v);
        }
    }
    for (int m = 0; m < M; m++) { out[m] = _mm512_reduce_add_ps(even[m]); out[SIDE + m] = _mm512_reduce_add_ps(odd[m]); }
}

static void strip(const bf16 *x, long M, const bf16 *w, long K, Sums sums) {
    for (int n = 0; n < SIDE; n += 2)
        for (long m = 0; m < M;) {
            const bf16 *from = x + m * K, *row = w + n * K;
            float *to = &sums[n][m];
            if (M - m >= 8) { dots(from, row, K, to, 8); m += 8; }
            else if (M - m >= 4) { dots(from, row, K, to, 4); m += 4; }
            else if (M - m >= 2) { dots(from, row, K, to, 2); m += 2; }
            else { dots(from, row, K, to, 1); m += 1; }
        }
}

static void multiply(const Input *in, const Pair *w, long pairs, int more, Sums *sums) {
    (void)more;
    for (long pair = 0; pair < pairs; pair++)
        for (long group = 0; group < groups_of(in->M); group++, sums += 2) {
            long first = group * SIDE, M = least(in->M - first, SIDE);
            strip(in->rows + first * in->K, M, w[pair][0], in->K, sums[0]);
            strip(in->rows + first * in->K, M, w[pair][1], in->K, sums[1]);
        }
}

#endif

// ---- from sums to bfloat16

// Vectors of the outputs of each row.
static void by_row(const Sums sums, __m512 v[SIDE]) {
    for (int n = 0; n < SIDE; n++) v[n] = _mm512_loadu_ps(sums[n]);
    transpose((__m512i *)v);
}

// silu(gate) · up, rounded wherever the reference's operations round.
static __m512 swiglu(__m512 gate, __m512 up) {
    gate = rounded(gate);
    __m512 one = _mm512_set1_ps(1.0f), e = exp512(_mm512_sub_ps(_mm512_setzero_ps(), gate));
    return _mm512_mul_ps(rounded(_mm512_div_ps(gate, _mm512_add_ps(one, e))), rounded(up));
}

// ---- work of all threads

enum { TILES, SUMS, MIDDLE, ROWS, RESULTS, LOGITS };  // rooms of scratch

static long share(long items, int thread, int threads) { return items * thread / threads; }

// Pairs of strips of w[., K]: pair p is of the outputs from `hop` · p on, and of those `apart` further.
typedef struct { const bf16 *w; long hop, apart, last; } Matrix;

static void find(const Matrix *matrix, long K, long pair, Pair strips) {
    long n = pair * matrix->hop, other = n + matrix->apart;
    strips[0] = matrix->w + n * K;
    strips[1] = matrix->w + (other < matrix->last ? other : n) * K;
}

// Calls done(to, N, pair, row, M, sums of the first strip, of the second) for rows `row` to row + M of pairs from `from` on.
typedef void Done(bf16 *to, long N, long pair, long row, long M, const Sums first, const Sums second);

static inline __attribute__((always_inline)) void strips(const Input *in, const Matrix *matrix, long from, long to, Done *done,
                                                         bf16 *y, long N) {
    long groups = groups_of(in->M);
    Sums *sums = (Sums *)scratch(SUMS, PAIRS * groups * 2 * sizeof(Sums));
    for (long pair = from; pair < to; pair += PAIRS) {
        Pair w[PAIRS + 1];
        long pairs = least(PAIRS, to - pair);
        for (long p = 0; p <= pairs; p++) find(matrix, in->K, pair + p, w[p]);
        multiply(in, w, pairs, pair + pairs < to, sums);
        for (long p = 0, at = 0; p < pairs; p++)
            for (long group = 0; group < groups; group++, at += 2)
                done(y, N, pair + p, group * SIDE, least(in->M - group * SIDE, SIDE), sums[at], sums[at + 1]);
    }
}

static void keep(bf16 *y, long N, long pair, long row, long M, const Sums first, const Sums second) {
    __m512 a[SIDE], b[SIDE];
    by_row(first, a);
    by_row(second, b);
    bf16 *to = y + row * N + pair * 2 * SIDE;
    int both = pair * 2 * SIDE + SIDE < N;
    for (long m = 0; m < M; m++) {
        store(to + m * N, a[m]);
        if (both) store(to + m * N + SIDE, b[m]);
    }
}

static void keep_gated(bf16 *h, long F, long pair, long row, long M, const Sums gate, const Sums up) {
    __m512 a[SIDE], b[SIDE];
    by_row(gate, a);
    by_row(up, b);
    for (long m = 0; m < M; m++) store(h + (row + m) * F + pair * SIDE, swiglu(a[m], b[m]));
}

// Pairs `from` to `to` of y[M, N] = x[M, K] w[N, K]^T
static void linear(const Input *in, const bf16 *w, bf16 *y, long N, long from, long to) {
    strips(in, &(Matrix){w, 2 * SIDE, SIDE, N}, from, to, keep, y, N);
}

// The same of h[M, F] = silu(x gate^T) · (x up^T), gate and up being the halves of w[2F, K]
static void gated(const Input *in, const bf16 *w, bf16 *h, long F, long from, long to) {
    strips(in, &(Matrix){w, SIDE, F, 2 * F}, from, to, keep_gated, h, F);
}

// The rows as a thread needs them, in memory of its own: packing twice costs less than waiting for each other.
static Input packed(const bf16 *rows, long M, long K) {
    Input in = {rows, scratch(TILES, groups_of(M) * (K / STEP) * TILE), M, K};
    for (long g = 0; g < groups_of(M); g++) pack_group(&in, g, (char *)in.tiles + g * (K / STEP) * TILE);
    return in;
}

int herd_prepare(void) { return prepare(); }

void herd_linear(const bf16 *x, const bf16 *w, bf16 *y, long M, long N, long K, int threads) {
    long pairs = (N / SIDE + 1) / 2;
    if (N * K < WORTH_A_THREAD) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int thread = omp_get_thread_num(), all = omp_get_num_threads();
        Input in = packed(x, M, K);
        begin();
        linear(&in, w, y, N, share(pairs, thread, all), share(pairs, thread + 1, all));
        end();
    }
}

// Feed-forward networks of E experts on rows that stand expert by expert: counts[e] rows of x[sum of counts, H] belong to
// gate_up[e] ([2F, H]) and down[e] ([H, F]); y as x. Threads share the strips of all experts, as if those were one matrix.
void herd_ffn(const bf16 *x, bf16 *y, const long *counts, const bf16 *const *gate_up, const bf16 *const *down,
              long E, long H, long F, int threads) {
    long first[E + 1], wide = F / SIDE, pairs = (H / SIDE + 1) / 2;
    first[0] = 0;
    for (long e = 0; e < E; e++) first[e + 1] = first[e] + counts[e];
    bf16 *h = (bf16 *)scratch(MIDDLE, first[E] * F * sizeof(bf16));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int thread = omp_get_thread_num(), all = omp_get_num_threads();
        begin();
        for (long item = share(E * wide, thread, all), last = share(E * wide, thread + 1, all); item < last;) {
            long e = item / wide, until = last < (e + 1) * wide ? last : (e + 1) * wide;
            Input in = packed(x + first[e] * H, counts[e], H);
            gated(&in, gate_up[e], h + first[e] * F, F, item - e * wide, until - e * wide);
            item = until;
        }
#pragma omp barrier
        for (long item = share(E * pairs, thread, all), last = share(E * pairs, thread + 1, all); item < last;) {
            long e = item / pairs, until = last < (e + 1) * pairs ? last : (e + 1) * pairs;
            Input in = packed(h + first[e] * F, counts[e], F);
            linear(&in, down[e], y + first[e] * H, H, item - e * pairs, until - e * pairs);
            item = until;
        }
        end();
    }
}

// ---- the gate and the routed experts of a layer

// The K largest of E logits, ties to the smaller expert, in ascending order of experts; scores are sigmoids in float32.
static void choose(const bf16 *logits, long E, long K, long *expert, bf16 *score) {
    for (long k = 0; k < K; k++) {
        long best = -1;
        for (long e = 0; e < E; e++) {
            int taken = 0;
            for (long j = 0; j < k; j++) taken |= expert[j] == e;
            if (!taken && (best < 0 || one(logits[e]) > one(logits[best]))) best = e;
        }
        expert[k] = best;
    }
    for (long k = 1; k < K; k++)
        for (long j = k; j > 0 && expert[j - 1] > expert[j]; j--) {
            long other = expert[j];
            expert[j] = expert[j - 1];
            expert[j - 1] = other;
        }
    for (long k = 0; k < K; k++) score[k] = rounded_one(1.0f / (1.0f + expf(-one(logits[expert[k]]))));
}

// experts and scores [T, K] of rows x[T, H] by the gate [E, H].
void herd_choose(const bf16 *x, const bf16 *gate, long *experts, bf16 *scores, long T, long H, long E, long K, int threads) {
    bf16 *logits = (bf16 *)scratch(LOGITS, T * E * sizeof(bf16));
    herd_linear(x, gate, logits, T, E, H, threads);
    for (long t = 0; t < T; t++) choose(logits + t * E, E, K, experts + t * K, scores + t * K);
}

// y[T, H]: the sum over a token's K experts, ascending, of their networks on its row times its score. All E experts have
// their matrices in gate_up and down; counts[E] gets the rows of each.
void herd_routed(const bf16 *x, const long *experts, const bf16 *scores, const bf16 *const *gate_up, const bf16 *const *down,
                 bf16 *y, long *counts, long T, long K, long E, long H, long F, int threads) {
    long rows = T * K, touched = 0, at[E], own[E];
    const bf16 *touched_gate_up[E], *touched_down[E];
    memset(counts, 0, E * sizeof(long));
    for (long r = 0; r < rows; r++) counts[experts[r]]++;
    for (long e = 0, first = 0; e < E; first += counts[e], e++) {
        at[e] = first;
        if (!counts[e]) continue;
        own[touched] = counts[e];
        touched_gate_up[touched] = gate_up[e];
        touched_down[touched++] = down[e];
    }
    bf16 *scaled = (bf16 *)scratch(ROWS, rows * H * sizeof(bf16)), *results = (bf16 *)scratch(RESULTS, rows * H * sizeof(bf16));
    long place[rows];
    for (long r = 0; r < rows; r++) {
        place[r] = at[experts[r]]++;
        __m512 score = _mm512_set1_ps(one(scores[r]));
        for (long h = 0; h < H; h += SIDE) store(scaled + place[r] * H + h, _mm512_mul_ps(load(x + r / K * H + h), score));
    }
    herd_ffn(scaled, results, own, touched_gate_up, touched_down, touched, H, F, threads);
    for (long t = 0; t < T; t++)
        for (long h = 0; h < H; h += SIDE) {
            __m512 sum = load(results + place[t * K] * H + h);
            for (long k = 1; k < K; k++) sum = _mm512_add_ps(sum, load(results + place[t * K + k] * H + h));
            store(y + t * H + h, sum);
        }
}
