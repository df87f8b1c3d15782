// Threads that share work, and wait for one another between its steps.

#include <atomic>
#include <chrono>
#include <thread>

namespace {

// Each thread takes pieces from the front of a stretch of its own, so that it reads on and on, and then from the backs
// of the others'.
struct Shares {
    struct alignas(64) Stretch {
        std::atomic<uint64_t> ends;  // its first piece, and from bit 32 on the one behind its last
    };
    Stretch* stretches = nullptr;
    int64_t count = 0, piece = 1, threads = 1;

    static int64_t bytes(int64_t threads) { return threads * sizeof(Stretch); }
    int64_t first_of(int64_t thread) const { return (count + piece - 1) / piece * thread / threads; }

    // Before any thread takes: `count` units of work, in pieces of `piece`; `memory` is `bytes` long.
    void begin(void* memory, int64_t threads, int64_t count, int64_t piece) {
        *this = {(Stretch*)memory, count, piece, threads};
        for (int64_t i = 0; i < threads; i++)
            stretches[i].ends.store(first_of(i) | first_of(i + 1) << 32, std::memory_order_relaxed);
    }
    // The next piece is first … last - 1. False: nothing is left.
    bool take(int64_t thread, int64_t& first, int64_t& last) {
        for (int64_t i = 0; i < threads; i++) {
            std::atomic<uint64_t>& ends = stretches[(thread + i) % threads].ends;
            uint64_t now = ends.load(std::memory_order_relaxed);
            while ((now & 0xffffffff) < now >> 32) {
                const uint64_t then = i ? now - (1ull << 32) : now + 1;
                if (!ends.compare_exchange_weak(now, then, std::memory_order_relaxed)) continue;
                first = (i ? then >> 32 : now & 0xffffffff) * piece;
                last = std::min(first + piece, count);
                return true;
            }
        }
        return false;
    }
};

// How many rows of a weight are a piece: so few that all end together, and so many that taking them is nothing.
INLINE int64_t rows_of_piece(int64_t rows, int64_t columns, int64_t threads) {
    constexpr int64_t CODES = 1 << 15, WHOLE = 4;
    return std::max<int64_t>(1, std::min(CODES / columns, rows / (4 * threads)) / WHOLE) * WHOLE;
}

// Where the threads of a team wait for one another: what they have done before is seen by all of them. One behind the
// other, OpenMP's own barrier takes 240 ns, and a first form of this one took 40 (two cores of Zen 5).
class Meeting {
  public:
    explicit Meeting(int64_t threads) : threads(threads) {}
    void wait() {
        const uint32_t now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int64_t i = 0; round.load(std::memory_order_acquire) == now; i++)
            if (i < patience) pause();
            else std::this_thread::sleep_for(std::chrono::microseconds(50));
    }

  private:
    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    // Turns of some 10 ns on Zen 5. After that, somebody else has the other's core, as at once where there are not enough
    // of them.
    int64_t patience_of(int64_t threads) const {
        static const int64_t cores = omp_get_num_procs();
        return threads > cores ? 1 << 7 : 1 << 17;
    }
    const int64_t threads, patience = patience_of(threads);
    alignas(64) std::atomic<int64_t> arrived{0};
    alignas(64) std::atomic<uint32_t> round{0};
};

// begin(threads), and then work(thread, meeting) in each of so many; in one where OpenMP does not give as many, as under
// a limit or inside of another team.
template <typename Begin, typename Work> void as_team(int64_t threads, Begin begin, Work work) {
    begin(threads);
    Meeting meeting(threads), alone(1);
    bool whole = false;
#pragma omp parallel num_threads(threads)
    if (omp_get_num_threads() == threads) {
        if (omp_get_thread_num() == 0) whole = true;
        work(omp_get_thread_num(), meeting);
    }
    if (whole) return;
    begin(1);
#pragma omp parallel num_threads(1)
    work(0, alone);
}

}  // namespace
