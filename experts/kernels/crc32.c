// CRC-32 of long buffers: folds them, by carry-less products, into 16 bytes that have the same remainder.
#include <immintrin.h>

enum { BLOCK = 16, LANES = 16, TURN = LANES * BLOCK };

// Moves a block by the distance whose remainders are in `by`, and adds what is there.
static inline __m128i fold(__m128i block, __m128i by, __m128i onto) {
    __m128i low = _mm_clmulepi64_si128(block, by, 0x00), high = _mm_clmulepi64_si128(block, by, 0x11);
    return _mm_xor_si128(onto, _mm_xor_si128(low, high));
}

static inline __m128i block_at(const unsigned char *at) { return _mm_loadu_si128((const __m128i *)at); }

// x^(n + 32), x^(n - 32) modulo the polynomial, bits reversed, for n bits of a turn and of a block.
static inline __m128i by_turn(void) { return _mm_set_epi64x(0x1322d1430, 0x11542778a); }
static inline __m128i by_block(void) { return _mm_set_epi64x(0x0ccaa009e, 0x1751997d0); }

#if defined(__VPCLMULQDQ__) && defined(__AVX512F__)

// Four lanes in each register.
static void fold_lanes(const unsigned char *from, long bytes, __m128i *lane) {
    const __m512i by = _mm512_broadcast_i32x4(by_turn());
    __m512i four[LANES / 4];
    for (int f = 0; f < LANES / 4; f++) four[f] = _mm512_loadu_si512(lane + 4 * f);
    for (long i = TURN; i < bytes; i += TURN)
        for (int f = 0; f < LANES / 4; f++) {
            __m512i low = _mm512_clmulepi64_epi128(four[f], by, 0x00), high = _mm512_clmulepi64_epi128(four[f], by, 0x11);
            four[f] = _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(from + i + 64 * f), 0x96);  // All three added.
        }
    for (int f = 0; f < LANES / 4; f++) _mm512_storeu_si512(lane + 4 * f, four[f]);
}

#else

static void fold_lanes(const unsigned char *from, long bytes, __m128i *lane) {
    for (long i = TURN; i < bytes; i += TURN)
        for (int l = 0; l < LANES; l++) lane[l] = fold(lane[l], by_turn(), block_at(from + i + l * BLOCK));
}

#endif

// The bytes one by one, from a register and to one.
static unsigned plain(unsigned crc, const unsigned char *from, long bytes) {
    for (long i = 0; i < bytes; i++) {
        crc ^= from[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (0xedb88320u & -(crc & 1));
    }
    return crc;
}

// Of `bytes` >= TURN from `begin` on.
unsigned herd_crc32(const unsigned char *data, long begin, long bytes) {
    const unsigned char *from = data + begin;
    long folded = bytes / TURN * TURN;
    __m128i lane[LANES];
    for (int l = 0; l < LANES; l++) lane[l] = block_at(from + l * BLOCK);
    lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128(-1));
    fold_lanes(from, folded, lane);
    for (int l = 1; l < LANES; l++) lane[0] = fold(lane[0], by_block(), lane[l]);
    // What is left has the remainder of all that was folded, for a register that begins with all bits zero.
    return ~plain(plain(0, (const unsigned char *)lane, BLOCK), from + folded, bytes - folded);
}
