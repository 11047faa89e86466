// One launch of a kernel, read from a file, under the thread sanitizer, which reports races and ends with 66:
//
//   g++ -fsanitize=thread -DVIM_EMULATION -DKERNEL=scan_forward -DSOURCE='"scan_forward.cu"' ... cuda_races.cpp
//   ./a.out LAUNCH
//
// LAUNCH: grid (3), threads, bytes of shared memory and the number of arguments as int64; then for each argument its
// bytes as int64, 0 for a null pointer, and whether it is memory; then its content.

#include "cuda_emulation.h"
#include SOURCE

#define ENTRY(kernel) EMULATION_ENTRY(kernel)
#define RUN_(kernel) emulation_run_##kernel
#define RUN(kernel) RUN_(kernel)
ENTRY(KERNEL)

static long long number(FILE* file) {
    long long value;
    if (fread(&value, sizeof value, 1, file) != 1) exit(1);
    return value;
}

int main(int, char** names) {
    FILE* file = fopen(names[1], "rb");
    if (!file) return 1;
    int sizes[6];
    for (int& size : sizes) size = static_cast<int>(number(file));
    std::vector<std::vector<char>> contents(sizes[5]);
    std::vector<void*> pointers(sizes[5]), arguments(sizes[5]);
    for (int i = 0; i < sizes[5]; i++) {
        const long long bytes = number(file), is_memory = number(file);
        contents[i].resize(bytes);
        if (fread(contents[i].data(), 1, bytes, file) != size_t(bytes)) return 1;
        pointers[i] = bytes ? contents[i].data() : nullptr;
        arguments[i] = is_memory ? static_cast<void*>(&pointers[i]) : pointers[i];
    }
    const char* problem = RUN(KERNEL)(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], arguments.data());
    if (problem) fprintf(stderr, "%s\n", problem);
    return problem != nullptr;
}
