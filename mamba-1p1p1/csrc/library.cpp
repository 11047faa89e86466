// What does not depend on the instruction set: which ones this processor has, and the workspace.
#include <cstdint>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "workspace.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Workspace {
    float* data = nullptr;
    size_t floats = 0;
    ~Workspace() { free(data); }
};

thread_local Workspace workspace;

}  // namespace

float* mamba_ssm_workspace(size_t floats) {
    if (floats > workspace.floats) {
        free(workspace.data);
        workspace.data = nullptr, workspace.floats = 0;
        void* data;
        if (posix_memalign(&data, 64, floats * sizeof(float)) == 0)
            workspace.data = static_cast<float*>(data), workspace.floats = floats;
    }
    return workspace.data;
}

void mamba_ssm_large_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t first = ((uintptr_t)data + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)data + bytes) / PAGE * PAGE;
    // It is advice: a system without such pages refuses, and ordinary ones do.
    if (last >= first + 4 * PAGE) (void)madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// 1 if this processor can run the kernels compiled for an instruction set.
EXPORT int mamba_ssm_has_avx512() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

// And whether it multiplies and adds pairs of bfloat16 in the AVX-512 kernels.
EXPORT int mamba_ssm_has_bf16_products() {
#if defined(__x86_64__)
    return mamba_ssm_has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

EXPORT int mamba_ssm_has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

// The digest of what this library was compiled from (setup.py). Python's side refuses one of other sources: an argument
// block that has changed would be read as rubbish.
EXPORT const char* mamba_ssm_sources() { return SOURCES; }
