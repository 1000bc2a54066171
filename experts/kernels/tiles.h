// AMX tiles of bfloat16: SIDE rows of STEP inputs by STEP inputs of SIDE columns, these in pairs of inputs.
#pragma once

enum { SIDE = 16, STEP = 32, TILE = 1024 /* bytes */ };

#ifdef __AMX_BF16__

#include <immintrin.h>
#include <stdint.h>
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
