// CRC-32 of long buffers: folds them, by carry-less products, into 16 bytes that have the same remainder.
#include <immintrin.h>

enum { BLOCK = 16, LANES = 4, TURN = LANES * BLOCK };

// Moves a block by the distance whose remainders are in `by`, and adds what is there.
static inline __m128i fold(__m128i block, __m128i by, __m128i onto) {
    __m128i low = _mm_clmulepi64_si128(block, by, 0x00), high = _mm_clmulepi64_si128(block, by, 0x11);
    return _mm_xor_si128(onto, _mm_xor_si128(low, high));
}

static inline __m128i block_at(const unsigned char *at) { return _mm_loadu_si128((const __m128i *)at); }

// `bytes` is a multiple of 64 and at least that. The CRC-32 of `from` is that of `to`, begun with all bits zero.
void herd_fold(const unsigned char *from, long bytes, unsigned char *to) {
    // x^(512 + 32), x^(512 - 32) and x^(128 + 32), x^(128 - 32) modulo the polynomial, bits reversed.
    const __m128i by_turn = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by_block = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i lane[LANES];
    for (int l = 0; l < LANES; l++) lane[l] = block_at(from + l * BLOCK);
    lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128(-1));
    for (long i = TURN; i < bytes; i += TURN)
        for (int l = 0; l < LANES; l++) lane[l] = fold(lane[l], by_turn, block_at(from + i + l * BLOCK));
    for (int l = 1; l < LANES; l++) lane[0] = fold(lane[0], by_block, lane[l]);
    _mm_storeu_si128((__m128i *)to, lane[0]);
}
