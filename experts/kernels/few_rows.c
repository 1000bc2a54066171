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
    WORTH_A_THREAD = 1 << 17,  // elements of a matrix; threads meet too slowly for less
};

typedef struct {
    const bf16 *rows;   // [M, K]
    const char *tiles;  // the same in the order of AMX, [groups, K / STEP] tiles; unused without AMX
    long M, K;
} Input;

typedef float Sums[SIDE][SIDE];  // [output, row]

static long least(long a, long b) { return a < b ? a : b; }

static long groups_of(long M) { return (M + SIDE - 1) / SIDE; }

// ---- sums of one strip and one group

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

// Two lines for every row of the strips that come next, in the order of memory: by then they have left it.
static void ask_for(const bf16 *w0, const bf16 *w1, long lead, long K, long step) {
    const bf16 *next0 = w0 + lead * K + step * SIDE * STEP, *next1 = w1 + lead * K + step * SIDE * STEP;
    for (int at = 0; at < 2 * SIDE * STEP; at += STEP) {
        _mm_prefetch((const char *)(next0 + at), _MM_HINT_T1);
        _mm_prefetch((const char *)(next1 + at), _MM_HINT_T1);
    }
}

// Sums of strips w0 and w1 with groups `group` and, if there is a second, the next: sums[strip + 2 * group].
// The strips that come next are `lead` rows further.
static void block(const Input *in, long group, int second, const bf16 *w0, const bf16 *w1, long lead, Sums *sums) {
    long steps = in->K / STEP, stride = in->K * sizeof(bf16);
    const char *x0 = in->tiles + group * steps * TILE, *x1 = x0 + steps * TILE;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long k = 0; k < steps; k++) {
        if (k % 2 == 0) ask_for(w0, w1, lead, in->K, k);
        _tile_loadd(4, w0 + k * STEP, stride);
        _tile_loadd(5, w1 + k * STEP, stride);
        _tile_loadd(6, x0 + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (second) {
            _tile_loadd(7, x1 + k * TILE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (second) { _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64); }
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

static void block(const Input *in, long group, int second, const bf16 *w0, const bf16 *w1, long lead, Sums *sums) {
    (void)lead;
    for (int g = 0; g <= second; g++) {
        long first = (group + g) * SIDE, M = least(in->M - first, SIDE);
        strip(in->rows + first * in->K, M, w0, in->K, sums[2 * g]);
        if (w1 != w0) strip(in->rows + first * in->K, M, w1, in->K, sums[2 * g + 1]);
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

enum { TILES, MIDDLE, ROWS, RESULTS, LOGITS };  // rooms of scratch

static long share(long items, int thread, int threads) { return items * thread / threads; }

// y[M, N] = x[M, K] w[N, K]^T
static void strips(const Input *in, const bf16 *w, bf16 *y, long N, long from, long to) {
    Sums sums[4];
    for (long pair = from; pair < to; pair++) {
        long n = pair * 2 * SIDE;
        int both = n + SIDE < N;
        const bf16 *w0 = w + n * in->K, *w1 = both ? w0 + SIDE * in->K : w0;
        for (long group = 0; group < groups_of(in->M); group += 2) {
            int second = group + 1 < groups_of(in->M);
            block(in, group, second, w0, w1, 2 * SIDE, sums);
            for (int g = 0; g <= second; g++) {
                long first = (group + g) * SIDE, M = least(in->M - first, SIDE);
                __m512 a[SIDE], b[SIDE];
                by_row(sums[2 * g], a);
                by_row(sums[2 * g + 1], b);
                for (long m = 0; m < M; m++) {
                    store(y + (first + m) * N + n, a[m]);
                    if (both) store(y + (first + m) * N + n + SIDE, b[m]);
                }
            }
        }
    }
}

// h[M, F] = silu(x gate^T) · (x up^T), gate and up being the halves of w[2F, K]
static void gated_strips(const Input *in, const bf16 *w, bf16 *h, long F, long from, long to) {
    Sums sums[4];
    for (long f = from * SIDE; f < to * SIDE; f += SIDE)
        for (long group = 0; group < groups_of(in->M); group += 2) {
            int second = group + 1 < groups_of(in->M);
            block(in, group, second, w + f * in->K, w + (F + f) * in->K, SIDE, sums);
            for (int g = 0; g <= second; g++) {
                long first = (group + g) * SIDE, M = least(in->M - first, SIDE);
                __m512 a[SIDE], b[SIDE];
                by_row(sums[2 * g], a);
                by_row(sums[2 * g + 1], b);
                for (long m = 0; m < M; m++) store(h + (first + m) * F + f, swiglu(a[m], b[m]));
            }
        }
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
        strips(&in, w, y, N, share(pairs, thread, all), share(pairs, thread + 1, all));
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
            gated_strips(&in, gate_up[e], h + first[e] * F, F, item - e * wide, until - e * wide);
            item = until;
        }
#pragma omp barrier
        for (long item = share(E * pairs, thread, all), last = share(E * pairs, thread + 1, all); item < last;) {
            long e = item / pairs, until = last < (e + 1) * pairs ? last : (e + 1) * pairs;
            Input in = packed(h + first[e] * F, counts[e], F);
            strips(&in, down[e], y + first[e] * H, H, item - e * pairs, until - e * pairs);
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
