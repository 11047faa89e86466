// OpenMP's functions that the kernels call. Declared here, since Apple's compiler comes without OpenMP's header.
#pragma once

extern "C" {
int omp_get_thread_num();
int omp_get_num_threads();
}
