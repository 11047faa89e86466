// Memory for intermediate results: one buffer per calling thread, kept from call to call, because fresh pages
// cost more than the arithmetic on them.
#pragma once

#include <cstddef>

extern "C" float* mamba_ssm_workspace(size_t floats);  // 64-byte aligned; null if there is no memory

// Asks for large pages where a buffer that is about to be written for the first time holds at least four. What it
// holds does not change, nor does anything else where the system gives none.
extern "C" void mamba_ssm_large_pages(void* data, size_t bytes);

namespace {

// Deals out one buffer. A first run over the same calls with a null base measures it.
struct Arena {
    float* base = nullptr;
    size_t used = 0;

    float* take(size_t floats) {
        size_t at = used;
        used += (floats + 15) / 16 * 16;
        return base ? base + at : nullptr;
    }
};

}  // namespace
