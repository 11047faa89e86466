// All kernels for one instruction set, named by the macro ISA; compiled once for each (setup.py).
#include "block.h"
#include "norm.h"
#include "selective_scan_backward.h"

#define JOIN(a, b) a##_##b
#define NAME(function, isa) JOIN(function, isa)
#define EXPORT(function) extern "C" __attribute__((visibility("default"))) int NAME(mamba_ssm_##function, ISA)

EXPORT(lanes)() { return VL; }

EXPORT(bimamba_forward)(const BimambaArguments* a) {
    return a->dtype == BFLOAT16 ? bimamba_forward<bf16>(*a) : bimamba_forward<float>(*a);
}

EXPORT(bimamba_backward)(const BimambaArguments* a) {
    return a->dtype == BFLOAT16 ? bimamba_backward<bf16>(*a) : bimamba_backward<float>(*a);
}

EXPORT(block_forward)(const BlockArguments* a) { return block_forward(*a); }

EXPORT(block_backward)(const BlockArguments* a) { return block_backward(*a); }

EXPORT(selective_scan_forward)(const ScanArguments* a) {
    return a->dtype == BFLOAT16 ? scan_forward<bf16>(*a) : scan_forward<float>(*a);
}

EXPORT(selective_scan_backward)(const ScanArguments* a) {
    return a->dtype == BFLOAT16 ? scan_backward<bf16>(*a) : scan_backward<float>(*a);
}

EXPORT(add_norm_forward)(const NormArguments* a) { return norm_forward(*a); }

EXPORT(add_norm_backward)(const NormArguments* a) { return norm_backward(*a); }
