// What products of many rows are made of: blocks of rows of x, sixteen rows transposed word by word, and a step, which is
// one float32 of each or a pair of bfloat16 where the processor multiplies pairs.

#ifdef HAS_AVX512
namespace {

constexpr int MOST_ROWS = 9, VR = 3;  // 27 sums in registers, three vectors of the weight and one of x
constexpr int64_t TILE = VR * LANES;

// Rows of x in blocks that differ by one row at most: one row alone would take half as long as eight.
struct RowBlocks {
    int64_t rows, most = MOST_ROWS, count = (rows + most - 1) / most;
    int64_t first_of(int64_t block) const { return rows * block / count; }
};

INLINE void transpose16(__m512i (&v)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm512_shuffle_i32x4(v[j], v[j + 4], 0x88);
        t[j + 4] = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0x88);
        t[j + 8] = _mm512_shuffle_i32x4(v[j], v[j + 4], 0xdd);
        t[j + 12] = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0xdd);
    }
    for (int j = 0; j < 4; j++) {
        v[j] = _mm512_shuffle_i32x4(t[j], t[j + 4], 0x88);
        v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 4], 0xdd);
        v[j + 4] = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0x88);
        v[j + 12] = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0xdd);
    }
}

template <bool PAIRS> INLINE __m512 multiply_step(__m512 sum, __m512i a, __m512i b) {
#ifdef HAS_BF16_DOT
    if (PAIRS) return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(a), bits_of<__m512bh>(b));
#endif
    return _mm512_fmadd_ps(bits_of<__m512>(a), bits_of<__m512>(b), sum);
}

}  // namespace
#endif
