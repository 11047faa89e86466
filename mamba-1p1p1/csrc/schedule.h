// How work is dealt out to threads.
#pragma once

#include <cstdint>

namespace {

// Parts of the channels of a batch item so that batch * parts units keep all threads busy.
int64_t channel_groups(int64_t batch, int64_t vectors, int64_t threads) {
    int64_t best = 1;
    double best_use = 0;
    for (int64_t parts = 1; parts <= vectors; ++parts) {
        int64_t units = batch * parts, rounds = (units + threads - 1) / threads;
        double use = (double)units / (double)(rounds * threads);
        if (use > best_use + 0.05) best = parts, best_use = use;
    }
    return best;
}

}  // namespace
