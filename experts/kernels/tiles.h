// AMX tiles of bfloat16: SIDE rows of STEP inputs by STEP inputs of SIDE columns, these in pairs of inputs.
#pragma once

#include "vector.h"

enum { SIDE = 16, STEP = 32, TILE = 1024 /* bytes */ };

#ifdef __AMX_BF16__

#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

// Whether this process may use tiles; once per process.
static inline int prepare(void) { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0; }

// A thread's tiles are its own between these.
static inline void begin(void) {
    struct { uint8_t palette, start, zero[14]; uint16_t width[16]; uint8_t height[16]; } shape = {.palette = 1};
    for (int t = 0; t < 8; t++) { shape.width[t] = 64; shape.height[t] = SIDE; }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape) : "memory");
}

static inline void end(void) { _tile_release(); }

#else

static inline int prepare(void) { return 1; }
static inline void begin(void) {}
static inline void end(void) {}

#endif

// 16 rows of 16 pairs, in place.
static inline void transpose(__m512i v[SIDE]) {
    __m512i t[SIDE], u[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            u[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        __m512i a = u[j], b = u[4 + j], c = u[8 + j], d = u[12 + j];
        __m512i even_top = _mm512_shuffle_i32x4(a, b, 0x88), even_low = _mm512_shuffle_i32x4(c, d, 0x88);
        __m512i odd_top = _mm512_shuffle_i32x4(a, b, 0xdd), odd_low = _mm512_shuffle_i32x4(c, d, 0xdd);
        v[j] = _mm512_shuffle_i32x4(even_top, even_low, 0x88);
        v[4 + j] = _mm512_shuffle_i32x4(odd_top, odd_low, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(even_top, even_low, 0xdd);
        v[12 + j] = _mm512_shuffle_i32x4(odd_top, odd_low, 0xdd);
    }
}

// Two rows of inputs of D columns each, as one row of pairs in each of D / SIDE tiles.
static inline void interleave(const bf16 *even, const bf16 *odd, long D, char *tiles) {
    short order[STEP];
    for (int i = 0; i < STEP; i++) order[i] = (short)(i / 2 + i % 2 * STEP);
    __m512i low = _mm512_loadu_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(SIDE));
    for (long d = 0; d < D; d += STEP, tiles += 2 * TILE) {
        __m512i a = _mm512_loadu_si512(even + d), b = _mm512_loadu_si512(odd + d);
        _mm512_storeu_si512(tiles, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(tiles + TILE, _mm512_permutex2var_epi16(a, high, b));
    }
}
