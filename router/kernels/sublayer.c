// The attention sublayer of a step in which every sequence has one token, in one call: between calls as small as its parts,
// all that the caller runs has left the caches for the weights.
//
// Letters: T tokens, H hidden size, N query heads, G key/value heads, P = N + 2 G, D head dimension.
#include "vector.h"

typedef struct {
    void (*norm)(const bf16 *, const bf16 *, bf16 *, long, long, float, int);
    void (*linear)(const bf16 *, const bf16 *, bf16 *, long, long, long, int);
    void (*turn)(bf16 *, const float *, float, const float *, bf16 *, bf16 *, const long *, long, long, long, long, int);
    void (*decode)(const bf16 *, long, bf16 *, const bf16 *, const bf16 *, const long *, const long *, const long *, long, long,
                   long, long, int);
} Parts;

typedef struct {
    const bf16 *norm, *qkv, *out;
    bf16 *keys, *values;
    long H, N, G, D;
    float norm_eps, qk_eps;  // qk_eps < 0: no norm of queries and keys
    int turns, warms;        // whether the layer rotates, whether it has a temperature
} Layer;

typedef struct {
    const float *turns, *temperatures;
    const long *slots, *starts, *lengths, *first;
    long T;
    int threads;
} Step;

// y = x + attention(norm(x)), [T, H]; `work` has room for T · (H + (P + N) · D) numbers.
void herd_sublayer(const Parts *parts, const Layer *layer, const Step *step, const bf16 *x, bf16 *y, bf16 *work) {
    long T = step->T, H = layer->H, N = layer->N, G = layer->G, D = layer->D, P = N + 2 * G;
    int threads = step->threads;
    bf16 *rows = work, *heads = rows + T * H, *mixed = heads + T * P * D;
    parts->norm(x, layer->norm, rows, T, H, layer->norm_eps, threads);
    parts->linear(rows, layer->qkv, heads, T, P * D, H, threads);
    parts->turn(heads, layer->turns ? step->turns : 0, layer->qk_eps, layer->warms ? step->temperatures : 0, layer->keys,
                layer->values, step->slots, T, N, G, D, threads);
    parts->decode(heads, P * D, mixed, layer->keys, layer->values, step->starts, step->lengths, step->first, T, N, G, D, threads);
    parts->linear(mixed, layer->out, rows, T, H, N * D, threads);
    for (long i = 0; i < T * H; i += 16) store(y + i, _mm512_add_ps(load(x + i), load(rows + i)));
}
