// Streams of CUDA, through the driver library that the process has already loaded.
//
// The driver library has one name for all versions of CUDA, and a cudaStream_t of the runtime
// library is a stream of the driver. Therefore cpumoe is compiled without CUDA's headers, links
// nothing of CUDA, and works beside whatever CUDA the host brought.
#pragma once

#include <memory>

#include "streams/stream_driver.h"

namespace cpumoe {

// The driver, for the CUDA context that is current on the calling thread. Streams must belong to
// this context. Throws std::runtime_error if the process does not use CUDA, has no current context,
// or has a driver older than CUDA 11.4.
std::shared_ptr<StreamDriver> OpenCudaDriver();

}  // namespace cpumoe
