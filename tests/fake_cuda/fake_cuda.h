// What tests ask of the fake driver. A real libcuda has none of these functions, so tests find them
// with dlsym.
#pragma once

#include <cstdint>

#include "fake_cuda/cuda_api.h"

extern "C" {
// Forgets violations and settings. Streams must be idle.
FAKE_CUDA_API void fake_cuda_reset();

// Uses of the driver that a real one forbids, or that would go wrong there at times. The text
// belongs to the first one, and is valid until the reset.
FAKE_CUDA_API int64_t fake_cuda_violations();
FAKE_CUDA_API const char* fake_cuda_first_violation();

// Every operation first waits for a random time of up to `microseconds`.
FAKE_CUDA_API void fake_cuda_delay(uint64_t seed, int microseconds);
// The nth call of `function` from now on (1: the next one) does nothing but return `error`.
FAKE_CUDA_API void fake_cuda_fail(const char* function, int nth, CUresult error);
// Whether streams can wait for values.
FAKE_CUDA_API void fake_cuda_wait_values(int supported);
// The device fails: from now on operations do nothing, and functions return an error.
FAKE_CUDA_API void fake_cuda_break();

// Allocations of page-locked memory that have not been freed.
FAKE_CUDA_API int64_t fake_cuda_host_allocations();
}
