// How fast this machine reads memory: sums over a buffer, in several streams of each thread as matrices are read.
#include <immintrin.h>
#include <omp.h>

enum { STREAMS = 4, LINE = 64, TURN = 4 * LINE };

// Read `bytes` at `from` once; the sum keeps compilers from leaving it out.
float herd_read(const char *from, long bytes, int threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        long each = bytes / omp_get_num_threads() / STREAMS / TURN * TURN;
        const char *mine = from + each * STREAMS * omp_get_thread_num();
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
        for (long i = 0; i < each; i += TURN)
            for (int s = 0; s < STREAMS; s++) {
                const char *at = mine + each * s + i;
                a = _mm512_add_ps(a, _mm512_loadu_ps(at));
                b = _mm512_add_ps(b, _mm512_loadu_ps(at + LINE));
                c = _mm512_add_ps(c, _mm512_loadu_ps(at + 2 * LINE));
                d = _mm512_add_ps(d, _mm512_loadu_ps(at + 3 * LINE));
            }
        total += _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
    }
    return total;
}
