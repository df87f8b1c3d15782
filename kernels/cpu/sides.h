// Scales and zero points of a weight's groups, transposed for the kernels that dequantize many of its rows.

#ifdef HAS_AVX512
namespace {

// scale and shift have a row of TILE for each group; a number is code * scale - shift.
struct Sides {
    float *scale, *shift;

    // Of sixteen rows of the weight, into columns from `column` on. `room` has 32 rows of scales.
    void fill(const Weight& w, int64_t n, int64_t column, float* room) const {
        const int64_t groups = whole(w.groups());
        for (int r = 0; r < 16; r++) w.sides(room + r * groups, room + (16 + r) * groups, std::min(n + r, w.rows - 1));
        for (int64_t g = 0; g < groups; g += LANES) {
            __m512i scales[16], shifts[16];
            for (int r = 0; r < 16; r++) {
                const __m512 s = _mm512_loadu_ps(room + r * groups + g);
                scales[r] = bits_of<__m512i>(s);
                shifts[r] = bits_of<__m512i>(_mm512_mul_ps(s, _mm512_loadu_ps(room + (16 + r) * groups + g)));
            }
            transpose16(scales), transpose16(shifts);
            for (int64_t j = 0; j < 16; j++) {
                _mm512_store_si512(scale + (g + j) * TILE + column, scales[j]);
                _mm512_store_si512(shift + (g + j) * TILE + column, shifts[j]);
            }
        }
    }
};

}  // namespace
#endif
