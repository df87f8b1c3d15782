// Matrix instructions (AMX): a thread has eight tiles of sixteen rows of 64 bytes. A product adds to numbers of 32 bits
//
//     C[i][j] += the sum over k of word k of A's row i times word j of B's row k,
//
// where words of pairs of bfloat16 or of four bytes, signed ones in A, are multiplied number by number, and added up.
// With EMULATE_TILES the same is computed in plain C++, so that what uses it can be tested on any processor.

#if defined(HAS_BF16_DOT) && defined(HAS_VNNI)
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define HAS_TILES 1
#elif defined(EMULATE_TILES)
#define HAS_TILES 1
#endif
#endif

#ifdef HAS_TILES
#ifndef EMULATE_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t SIDE = 16;  // rows of a tile, and words of a row

struct alignas(64) Tile {
    char row[SIDE][64];
};

#ifndef EMULATE_TILES

// Linux gives a process the registers when it asks for them.
bool may_use_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool may = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return may;
}

// While there is one, its thread has tiles.
struct Tiles {
    Tiles() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        static_assert(sizeof config == 64, "as the processor reads it");
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
};

// Not the compiler's intrinsics, which want the numbers of tiles as literals, and do not say what memory they read.
template <int T> INLINE void load_tile(const Tile* at) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(64l), "i"(T), "m"(*at));
}
template <int T> INLINE void store_tile(Tile* at) {
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*at) : "r"(at), "r"(64l), "i"(T));
}
template <int T> INLINE void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int C, int A, int B> INLINE void multiply_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> INLINE void multiply_fours() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

thread_local Tile tile[8];

bool may_use_tiles() { return true; }

struct Tiles {
    Tiles() { std::memset(tile, 0, sizeof tile); }
    ~Tiles() {}
};

template <int T> void load_tile(const Tile* at) { tile[T] = *at; }
template <int T> void store_tile(Tile* at) { *at = tile[T]; }
template <int T> void zero_tile() { tile[T] = {}; }

template <typename Sum, typename OfA, typename OfB, typename Number>
void multiply_words(Tile& c, const Tile& a, const Tile& b, Number number) {
    constexpr int OF_WORD = 4 / sizeof(OfA);
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            Sum sum = load<Sum>(c.row[i] + 4 * j);
            for (int k = 0; k < SIDE; k++)
                for (int n = 0; n < OF_WORD; n++)
                    sum += number(load<OfA>(a.row[i] + 4 * k + n * sizeof(OfA))) *
                           number(load<OfB>(b.row[k] + 4 * j + n * sizeof(OfB)));
            store(c.row[i] + 4 * j, sum);
        }
}
template <int C, int A, int B> void multiply_pairs() {
    auto number = [](uint16_t bits) { return bits_of<float>((uint32_t)bits << 16); };
    multiply_words<float, uint16_t, uint16_t>(tile[C], tile[A], tile[B], number);
}
template <int C, int A, int B> void multiply_fours() {
    auto number = [](int code) { return code; };
    multiply_words<int32_t, int8_t, uint8_t>(tile[C], tile[A], tile[B], number);
}

#endif
}  // namespace
#endif

// Are there tiles, and does the system let us use them?
extern "C" int has_tiles() {
#ifdef HAS_TILES
    return may_use_tiles();
#else
    return 0;
#endif
}
