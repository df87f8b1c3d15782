// Codes as bytes, many at a time: a vector of the first plane holds FIELDS codes in each byte, which masks and shifts
// take apart.

#ifdef HAS_VNNI
namespace {

constexpr int FIELDS = 8 / width_of(0);       // blocks of sixteen codes in sixteen bytes of the first plane
constexpr int64_t STEP = 4 * LANES * FIELDS;  // codes in a vector of that plane
constexpr int64_t STEP_BYTES = STEP * BITS / 8;

// Sixteen bytes of the first plane are a lane; of another plane, each lane gets the bytes that hold its codes' bits,
// turned so that they begin at bit 0.
template <bool LAST> INLINE __m512i lanes_of(int p, const uint8_t* from, int64_t columns) {
    const int64_t size = 64 * width_of(p) / width_of(0);
    const int64_t left = LAST ? plane_bytes(p, columns) - columns / STEP * size : size;
    if (size == 64) return LAST ? _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, left), from) : _mm512_loadu_si512(from);
    auto turn = [&](int lane) { return lane * FIELDS % (8 / width_of(p)) * width_of(p); };
    const __m512i turns = _mm512_set_epi32(turn(3), turn(3), turn(3), turn(3), turn(2), turn(2), turn(2), turn(2),
                                           turn(1), turn(1), turn(1), turn(1), turn(0), turn(0), turn(0), turn(0));
    __m512i v;
    if (size == 32) {
        v = _mm512_castsi256_si512(LAST ? _mm256_maskz_loadu_epi8(_bzhi_u32(~0u, left), from) : load<__m256i>(from));
        v = _mm512_shuffle_i64x2(v, v, 0x50);
    } else {
        v = _mm512_broadcast_i32x4(load<__m128i>(from));
    }
    return _mm512_srlv_epi32(v, turns);
}

// Bits of the planes where they belong in a code, by shifts of words, since nothing shifts bytes: what crosses over is
// masked.
INLINE __m512i field_of(const __m512i (&v)[PLANES], int field) {
    __m512i codes{};
    for (int p = 0; p < PLANES; p++) {
        const int width = width_of(p), low = low_of(p), shift = field * width - low;
        if (width == 8) return v[p];
        const __m512i part = shift > 0   ? _mm512_srli_epi16(v[p], shift)
                             : shift < 0 ? _mm512_slli_epi16(v[p], -shift)
                                         : v[p];
        const __m512i mask = _mm512_set1_epi8(((1 << width) - 1) << low);
        codes = p ? _mm512_ternarylogic_epi32(codes, part, mask, 0xf8) : _mm512_and_si512(part, mask);  // | part & mask
    }
    return codes;
}

#ifdef __GFNI__
// The matrix over bits that moves `width` of a byte's, from `from` on, to `to`, and makes all others 0.
constexpr uint64_t moves_bits(int width, int from, int to) {
    uint64_t matrix = 0;
    for (int bit = 0; bit < width; bit++) matrix |= 1ull << (from + bit) << 8 * (7 - to - bit);
    return matrix;
}

// The same by products with matrices: one instruction for two, though of the ports that products of bytes have.
INLINE __m512i field_by_matrix(const __m512i (&v)[PLANES], int field) {
    __m512i codes{};
    for (int p = 0; p < PLANES; p++) {
        const int width = width_of(p), low = low_of(p);
        if (width == 8) return v[p];
        const __m512i matrix = _mm512_set1_epi64(moves_bits(width, field * width, low));
        const __m512i part = field * width == low ? _mm512_and_si512(v[p], _mm512_set1_epi8(((1 << width) - 1) << low))
                                                  : _mm512_gf2p8affine_epi64_epi8(v[p], matrix, 0);
        codes = p ? _mm512_or_si512(codes, part) : part;
    }
    return codes;
}
#else
INLINE __m512i field_by_matrix(const __m512i (&v)[PLANES], int field) { return field_of(v, field); }
#endif

}  // namespace
#endif
