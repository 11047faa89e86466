// Which instruction sets this processor has: 1 if it can run the kernels compiled for one.
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int causal_conv1d_has_avx512() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

EXPORT int causal_conv1d_has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

// The digest of what this library was compiled from (setup.py). Python's side refuses one of other sources: an argument
// block that has changed would be read as rubbish.
EXPORT const char* causal_conv1d_sources() { return SOURCES; }
