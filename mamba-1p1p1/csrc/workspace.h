// Memory for intermediate results: one buffer per calling thread, kept from call to call, because fresh pages
// cost more than the arithmetic on them.
#pragma once

#include <cstddef>

extern "C" float* mamba_ssm_workspace(size_t floats);  // 64-byte aligned; null if there is no memory

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
