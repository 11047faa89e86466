// CUDA for the CPU: compiles the package's kernels, unchanged, with a C++ compiler and runs them, to test their
// arithmetic, their indices and their synchronisation where there is no GPU. mamba_ssm/ops/cuda/runtime.py includes
// it before a kernel's source and calls what EMULATION_ENTRY defines.
//
// The blocks of a grid run one after the other. A block's threads are fibers: one runs until it waits at a barrier
// or for its warp, then the next one does, first to last in even blocks, last to first in odd ones. Found are, by
// NaN in the results: shared memory read before it is written (every byte is 0xff when a block starts), before its
// cp_async was waited for, or before another thread has passed a barrier. Found and reported are: deadlocks, lanes of
// a warp in different collectives, misaligned copies, writes just behind the dynamic shared memory. Everything else
// out of bounds is found by -fsanitize=address, and races by -fsanitize=thread (cuda_races.cpp): two threads, of one
// block or of two, at one place of which one writes, with no barrier between them.
#pragma once

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* place);
void __tsan_release(void* place);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define DEVICE static inline __attribute__((unused))
#define DYNAMIC_SHARED(name) char* const name = emulation::shared_memory

// --- CUDA's own types and functions

struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename To, typename From>
static inline To emulation_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline unsigned __float_as_uint(float v) { return emulation_bits<unsigned>(v); }
static inline float __uint_as_float(unsigned v) { return emulation_bits<float>(v); }
template <typename A, typename B>
static inline std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B>
static inline std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

// --- fibers and barriers

namespace emulation {

constexpr int LANES = 32, MAX_THREADS = 1024, MAX_SHARED = 227 * 1024;
constexpr size_t STACK = 256 * 1024;
#ifdef __SANITIZE_ADDRESS__
constexpr int CANARY = 0;  // bytes behind the shared memory that must stay as they are: the sanitizer sees to it
#else
constexpr int CANARY = 4096;
#endif

#ifdef __SANITIZE_THREAD__
constexpr bool SEES_RACES = true;
// What is done while one of these lives is the emulation's own, and no race.
struct Unseen {
    Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
    ~Unseen() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
};
static void acquire(void* place) { __tsan_acquire(place); }
static void release(void* place) { __tsan_release(place); }
#else
constexpr bool SEES_RACES = false;
struct Unseen {
    ~Unseen() {}
};
static void acquire(void*) {}
static void release(void*) {}
#endif

struct Fiber;

struct Barrier {
    std::string name;
    int needed = 0;
    std::vector<Fiber*> waiting;
    // What was written before the barrier is seen behind it: places for two passages in turns, as a thread may be at the
    // next one while another still has to leave this one. Each block gets its own, never freed: its barriers order nothing
    // of other blocks.
    char* order = SEES_RACES ? static_cast<char*>(malloc(2)) : nullptr;
    unsigned passages = 0;
};

// What the lanes of a warp give each other. Two of them, in turns: a lane may be one collective ahead of another.
struct Exchange {
    const char* what[LANES];
    unsigned values[LANES][6];
};

struct Warp {
    Barrier barrier;
    Exchange exchange[2];
};

struct Copy { void* to; const void* from; int bytes; };

struct Fiber {
    uint3 index;
    int number;
    char* stack;
    bool started, done;
    unsigned collectives;           // how many this lane has begun
    Barrier* waits_for;
    std::deque<std::vector<Copy>> copies;  // groups of cp_async, the open one last
    jmp_buf where;
    ucontext_t context;
    void* sanitizer;  // the thread sanitizer's name for it
    Warp* warp;
    int lane() const { return number % LANES; }
};

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / LANES];
static Barrier block_barrier, named_barriers[16];
static std::deque<Fiber*> ready;
static Fiber* self;
static uint3 block_index, grid_size, block_size;
static char* shared_memory;
static int shared_bytes;
static std::string problem;
static void (*body)(void*);
static void* body_argument;
static ucontext_t scheduler;
static jmp_buf scheduler_jump;
static void* scheduler_of_sanitizer;
static char begin_order, end_order;  // of a grid
#ifdef __SANITIZE_ADDRESS__
static const void* main_stack;
static size_t main_stack_size;
#endif

[[noreturn]] static void fiber_main();

// Save where `from` is (null: the scheduler) and go on where `to` is (null: the scheduler).
static __attribute__((noinline)) void change(Fiber* from, Fiber* to) {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, to ? to->stack : main_stack, to ? STACK : main_stack_size);
    swapcontext(from ? &from->context : &scheduler, to ? &to->context : &scheduler);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to ? to->sanitizer : scheduler_of_sanitizer, 1);  // 1: orders nothing
    swapcontext(from ? &from->context : &scheduler, to ? &to->context : &scheduler);
#else
    // swapcontext saves the signal mask by a system call each time; it is needed for a fiber's first start only.
    if (_setjmp(from ? from->where : scheduler_jump)) return;
    if (!to) _longjmp(scheduler_jump, 1);
    if (to->started) _longjmp(to->where, 1);
    to->started = true;
    setcontext(&to->context);
#endif
}

static void go_on() {
    Fiber *from = self, *to = nullptr;
    {
        Unseen unseen;
        if (problem.empty() && !ready.empty()) {
            to = ready.front();
            ready.pop_front();
        }
        self = to;
    }
    if (from != to) change(from, to);
}

static void fail(const std::string& text) {
    if (problem.empty()) {
        char block[64];
        snprintf(block, sizeof block, "block (%u, %u, %u)", block_index.x, block_index.y, block_index.z);
        problem = block + (self ? ", thread " + std::to_string(self->number) : "") + ": " + text;
    }
    if (self) go_on();  // never to come back: the scheduler gives up
}

static void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!main_stack) main_stack = bottom, main_stack_size = size;  // the scheduler starts the first one
#endif
    acquire(&begin_order);
    body(body_argument);
    release(&end_order);
    {
        Unseen unseen;
        self->done = true;
    }
    go_on();
    abort();
}

// Barriers and announcements whose names begin as this variable says order no memory: that a race is found, is tested so.
static const char* const UNORDERED = getenv("EMULATION_UNORDERED");

static bool orders(const char* name) { return !(UNORDERED && !strncmp(name, UNORDERED, strlen(UNORDERED))); }

// `name`: of what orders memory, as all barriers do.
static void wait(Barrier& barrier, const char* name) {
    Unseen unseen;
    bool ordered = name && orders(name);
    char* order = barrier.order + barrier.passages % 2;
    if (ordered) release(order);
    if (int(barrier.waiting.size()) + 1 == barrier.needed) {
        for (Fiber* fiber : barrier.waiting) {
            fiber->waits_for = nullptr;
            ready.push_back(fiber);
        }
        barrier.waiting.clear();
        barrier.passages++;
    } else {
        barrier.waiting.push_back(self);
        self->waits_for = &barrier;
        go_on();
    }
    if (ordered) acquire(order);
}

// Give `count` words to the warp and wait for what the other lanes give. Of all that warps do together, sync_warp alone
// orders memory.
static Exchange& exchange(const char* what, const unsigned* values, int count) {
    Unseen unseen;
    Exchange& now = self->warp->exchange[self->collectives++ % 2];
    now.what[self->lane()] = what;
    for (int i = 0; i < count; i++) now.values[self->lane()][i] = values[i];
    wait(self->warp->barrier, strcmp(what, "sync_warp") ? nullptr : what);
    if (strcmp(now.what[0], what)) fail(std::string("lanes of one warp are in ") + what + " and in " + now.what[0]);
    return now;
}

static std::string describe_deadlock(int threads) {
    std::string text = "deadlock:";
    std::vector<Barrier*> seen;
    int returned = 0;
    for (int i = 0; i < threads; i++) {
        Barrier* barrier = fibers[i].waits_for;
        returned += fibers[i].done;
        bool known = !barrier;
        for (Barrier* other : seen) known |= other == barrier;
        if (known) continue;
        seen.push_back(barrier);
        text += " " + std::to_string(barrier->waiting.size()) + " of " + std::to_string(barrier->needed) +
                " threads (the first is " + std::to_string(i) + ") wait in " + barrier->name + ";";
    }
    return text + " " + std::to_string(returned) + " of " + std::to_string(threads) + " have returned";
}

static char* new_shared_memory() {
    return static_cast<char*>(aligned_alloc(16, (shared_bytes + CANARY + 15) / 16 * 16));
}

static void prepare_block(int threads) {
    if (SEES_RACES) {  // other blocks have other shared memory
        free(shared_memory);
        shared_memory = new_shared_memory();
    }
    memset(shared_memory, 0xff, shared_bytes + CANARY);
    ready.clear();
    block_barrier = {"sync_block", threads, {}};
    for (int id = 0; id < 16; id++) named_barriers[id] = {"sync_named " + std::to_string(id), 0, {}};
    for (int i = 0; i < threads / LANES; i++) {
        warps[i].barrier = {"a collective of warp " + std::to_string(i), LANES, {}};
    }
    bool descending = (block_index.x + block_index.y + block_index.z) % 2;
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.index = {unsigned(i), 0, 0};
        fiber.number = i;
        fiber.started = fiber.done = false;
        fiber.collectives = 0;
        fiber.waits_for = nullptr;
        fiber.copies.assign(1, {});
        fiber.warp = &warps[i / LANES];
#ifdef __SANITIZE_THREAD__
        if (fiber.sanitizer) __tsan_destroy_fiber(fiber.sanitizer);  // other blocks have other threads
        fiber.sanitizer = __tsan_create_fiber(0);
#endif
        if (SEES_RACES && fiber.stack) {  // what a thread of another block had on its stack
            munmap(fiber.stack, STACK);
            fiber.stack = nullptr;
        }
        if (!fiber.stack) {
            void* memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory == MAP_FAILED) abort();
            fiber.stack = static_cast<char*>(memory);
        }
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(fiber_main), 0);
        if (descending) ready.push_front(&fiber);
        else ready.push_back(&fiber);
    }
}

static void run_block(int threads) {
    prepare_block(threads);
    go_on();  // comes back when no thread can run
    int done = 0;
    for (int i = 0; i < threads; i++) done += fibers[i].done;
    if (done < threads) fail(describe_deadlock(threads));
    for (int i = 0; i < CANARY; i++) {
        if (shared_memory[shared_bytes + i] != char(0xff)) {
            fail("wrote " + std::to_string(i) + " bytes behind its " + std::to_string(shared_bytes) +
                 " bytes of shared memory");
        }
    }
}

static bool check_launch(int gx, int gy, int gz, int threads, int shared) {
    char text[160] = "";
    if (threads < LANES || threads > MAX_THREADS || threads % LANES) {
        snprintf(text, sizeof text, "%d threads: a block has 32 to 1024, whole warps", threads);
    } else if (shared < 0 || shared > MAX_SHARED) {
        snprintf(text, sizeof text, "%d bytes of shared memory: a block has at most %d", shared, MAX_SHARED);
    } else if (gx < 1 || gy < 1 || gz < 1 || gy > 65535 || gz > 65535) {
        snprintf(text, sizeof text, "grid (%d, %d, %d): 1 to 65535, more in the first place only", gx, gy, gz);
    }
    problem = text;
    return problem.empty();
}

static const char* run_grid(int gx, int gy, int gz, int threads, int shared, void (*run)(void*), void* argument) {
    if (!check_launch(gx, gy, gz, threads, shared)) return problem.c_str();
#ifdef __SANITIZE_THREAD__
    scheduler_of_sanitizer = __tsan_get_current_fiber();
#endif
    release(&begin_order);
    Unseen unseen;
    grid_size = {unsigned(gx), unsigned(gy), unsigned(gz)};
    block_size = {unsigned(threads), 1, 1};
    body = run, body_argument = argument;
    shared_bytes = shared;
    shared_memory = new_shared_memory();
    self = nullptr;
    for (int z = 0; z < gz && problem.empty(); z++)
        for (int y = 0; y < gy && problem.empty(); y++)
            for (int x = 0; x < gx && problem.empty(); x++) {
                block_index = {unsigned(x), unsigned(y), unsigned(z)};
                run_block(threads);
            }
    free(shared_memory);
    acquire(&end_order);
    return problem.empty() ? nullptr : problem.c_str();
}

// A kernel and the addresses of its arguments.
template <typename... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    void** arguments;
    template <size_t... I>
    void unpack(std::index_sequence<I...>) const {
        kernel(*static_cast<std::remove_cv_t<Parameters>*>(arguments[I])...);
    }
    static void run(void* call) { static_cast<Call*>(call)->unpack(std::index_sequence_for<Parameters...>()); }
};

template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), int gx, int gy, int gz, int threads, int shared, void** arguments) {
    Call<Parameters...> call{kernel, arguments};
    return run_grid(gx, gy, gz, threads, shared, Call<Parameters...>::run, &call);
}

// One letter a parameter, as runtime.py packs it.
template <typename T>
constexpr char letter() {
    if (std::is_pointer_v<T>) return 'Q';
    if (std::is_same_v<T, long long>) return 'q';
    if (std::is_same_v<T, int>) return 'i';
    return std::is_same_v<T, float> ? 'f' : '?';
}

template <typename... Parameters>
const char* signature(void (*)(Parameters...)) {
    static const char letters[] = {letter<std::remove_cv_t<Parameters>>()..., 0};
    return letters;
}

}  // namespace emulation

#define EMULATION_ENTRY(kernel)                                                                              \
    extern "C" __global__ const char* emulation_signature_##kernel() { return emulation::signature(kernel); } \
    extern "C" __global__ const char* emulation_run_##kernel(                                                \
        int gx, int gy, int gz, int threads, int shared, void** arguments) {                                 \
        return emulation::launch(kernel, gx, gy, gz, threads, shared, arguments);                            \
    }

#define threadIdx (emulation::self->index)
#define blockIdx (emulation::block_index)
#define gridDim (emulation::grid_size)
#define blockDim (emulation::block_size)

// --- device.cuh's functions

#ifndef HALF_IS_BF16
#define HALF_IS_BF16 1
#endif

DEVICE float emulation_flush(float v) { return fabsf(v) < FLT_MIN ? copysignf(0.0f, v) : v; }
DEVICE float ex2(float v) { return emulation_flush(exp2f(emulation_flush(v))); }
DEVICE float lg2(float v) { return emulation_flush(log2f(emulation_flush(v))); }
DEVICE float rcp(float v) { return emulation_flush(1.0f / emulation_flush(v)); }

#if HALF_IS_BF16
DEVICE float widen(unsigned short half) { return __uint_as_float(unsigned(half) << 16); }
DEVICE unsigned short narrow(float v) {
    unsigned bits = __float_as_uint(v);
    return isnan(v) ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
DEVICE float widen(unsigned short half) {
    int exponent = half >> 10 & 31, fraction = half & 1023;
    float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
    return half & 0x8000 ? -value : value;
}
DEVICE unsigned short narrow(float v) {
    if (isnan(v)) return 0x7fff;
    unsigned bits = __float_as_uint(v), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x477ff000) return (unsigned short)(sign | 0x7c00);  // 65520, halfway past the largest one
    if (bits < 0x38800000) return (unsigned short)(sign | unsigned(nearbyintf(fabsf(v) * 16777216.0f)));  // subnormal
    return (unsigned short)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
#endif
DEVICE unsigned narrow2(float low, float high) { return narrow(low) | unsigned(narrow(high)) << 16; }

DEVICE unsigned to_tf32(float v) {
    return isnan(v) ? 0x7fffffffu : (__float_as_uint(v) + 0x1000u) & 0xffffe000u;
}

DEVICE void sync_block() { emulation::wait(emulation::block_barrier, "sync_block"); }
DEVICE void sync_warp() { emulation::exchange("sync_warp", nullptr, 0); }

DEVICE void announce(int* flag) {
    if (emulation::orders("announce")) emulation::release(flag);
    emulation::Unseen unseen;
    *flag = 1;
}

DEVICE void await(const int* flag) {
    {
        emulation::Unseen unseen;
        if (*flag != 1) emulation::fail("await: the flag is " + std::to_string(*flag) + ", and blocks come in their order");
    }
    if (emulation::orders("announce")) emulation::acquire(const_cast<int*>(flag));
}

template <int ID, int COUNT>
DEVICE void sync_named() {
    if (ID < 1 || ID > 15) emulation::fail("sync_named " + std::to_string(ID) + ": 1 to 15");
    if (COUNT < 32 || COUNT % 32) emulation::fail("sync_named takes whole warps, not " + std::to_string(COUNT));
    emulation::Barrier& barrier = emulation::named_barriers[ID];
    if (!barrier.waiting.empty() && barrier.needed != COUNT) emulation::fail(barrier.name + ": threads differ");
    {
        emulation::Unseen unseen;
        barrier.needed = COUNT;
    }
    emulation::wait(barrier, "sync_named");
}

template <typename T>
DEVICE void hold(T&) {}

DEVICE const char* advance(const char* base, int count, int bytes) { return base + long(count) * bytes; }

DEVICE int warp_of_block() { return static_cast<int>(threadIdx.x / 32); }

DEVICE float shfl_xor(float v, int mask) {
    if (mask < 0 || mask > 31) emulation::fail("shfl_xor by " + std::to_string(mask) + ": 0 to 31");
    unsigned word = __float_as_uint(v);
    emulation::Unseen unseen;
    return __uint_as_float(emulation::exchange("shfl_xor", &word, 1).values[emulation::self->lane() ^ mask][0]);
}

namespace emulation {

// Towards zero, as the tensor cores round their sums.
static inline float cut(double v) {
    float near = float(v);
    return fabs(double(near)) > fabs(v) ? nextafterf(near, 0.0f) : near;
}

// c[16 x 8] += a[16 x 4 CHUNKS] b[4 CHUNKS x 8]; `words`: this lane's of a, then of b. The places among the lanes are
// the PTX manual's, and CUTLASS's (SM80_16x8x4 and SM80_16x8x8_F32TF32TF32F32_TN of its mma_traits_sm80.hpp).
template <int CHUNKS>
static void multiply(float (&c)[4], unsigned (&words)[3 * CHUNKS], const char* what) {
    for (unsigned& word : words) word &= 0xffffe000u;  // the unit does not see the other bits
    Unseen unseen;
    const auto& lanes = exchange(what, words, 3 * CHUNKS).values;
    int g = self->lane() / 4, t = self->lane() % 4;
    for (int i = 0; i < 4; i++) {
        int low_row = i / 2, column = 2 * t + i % 2;  // c[i] is at (g + 8 low_row, column)
        double sum = c[i];
        for (int k = 0; k < 4 * CHUNKS; k++) {
            float left = __uint_as_float(lanes[g * 4 + k % 4][low_row + 2 * (k / 4)]);
            float right = __uint_as_float(lanes[column * 4 + k % 4][2 * CHUNKS + k / 4]);
            sum += double(left) * right;
        }
        c[i] = cut(sum);
    }
}

}  // namespace emulation

DEVICE void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    emulation::multiply<2>(c, words, "mma_tf32 of 8");
}

DEVICE void mma_tf32(float (&c)[4], const unsigned (&a)[2], unsigned b) {
    unsigned words[3] = {a[0], a[1], b};
    emulation::multiply<1>(c, words, "mma_tf32 of 4");
}

namespace emulation {

static void begin_copy(void* to, const void* from, int bytes) {
    if (uintptr_t(to) % bytes || uintptr_t(from) % bytes) {
        fail("cp_async: misaligned for " + std::to_string(bytes) + " bytes");
    }
    char* start = static_cast<char*>(to);
    if (start < shared_memory || start + bytes > shared_memory + shared_bytes) {
        fail("cp_async: destination at byte " + std::to_string(start - shared_memory) + " of " +
             std::to_string(shared_bytes) + " of shared memory");
    }
    memset(to, 0xff, bytes);
    Unseen unseen;
    // read at once: a copy that nothing waits for is out of bounds, too
    static volatile char seen;
    for (int i = 0; i < bytes; ++i) seen = static_cast<const char*>(from)[i];
    self->copies.back().push_back({to, from, bytes});
}

static void commit_copies() {
    Unseen unseen;
    self->copies.emplace_back();
}

static void wait_for_copies(size_t still_open) {
    std::vector<Copy> complete;
    {
        Unseen unseen;
        for (; self->copies.size() > still_open + 1; self->copies.pop_front()) {
            const std::vector<Copy>& group = self->copies.front();
            complete.insert(complete.end(), group.begin(), group.end());
        }
    }
    for (const Copy& copy : complete) memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace emulation

DEVICE void cp_async16(void* shared, const void* global) { emulation::begin_copy(shared, global, 16); }
DEVICE void cp_async16_if(bool wanted, void* shared, const void* global) {
    if (wanted) cp_async16(shared, global);
}
DEVICE void cp_async4(void* shared, const void* global) { emulation::begin_copy(shared, global, 4); }
DEVICE void cp_async_commit() { emulation::commit_copies(); }
template <int N>
DEVICE void cp_async_wait() { emulation::wait_for_copies(N); }
