// The functions of CUDA's driver library that the bridge and its tests use, with the library's
// binary interface. A program that includes this file runs with the fake library of this folder, or
// with a real one if LD_LIBRARY_PATH names its folder.
#pragma once

#include <cstddef>
#include <cstdint>

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphNode = struct CUgraphNode_st*;
using CUgraphExec = struct CUgraphExec_st*;

inline constexpr CUresult CUDA_SUCCESS = 0;
inline constexpr CUresult CUDA_ERROR_INVALID_VALUE = 1;
inline constexpr CUresult CUDA_ERROR_OUT_OF_MEMORY = 2;
inline constexpr CUresult CUDA_ERROR_INVALID_CONTEXT = 201;
inline constexpr CUresult CUDA_ERROR_ILLEGAL_ADDRESS = 700;
inline constexpr CUresult CUDA_ERROR_NOT_PERMITTED = 800;
inline constexpr CUresult CUDA_ERROR_NOT_SUPPORTED = 801;
inline constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900;

inline constexpr int CU_STREAM_CAPTURE_MODE_GLOBAL = 0;
inline constexpr int CU_STREAM_CAPTURE_MODE_RELAXED = 2;
inline constexpr unsigned CU_STREAM_NON_BLOCKING = 1;

#define FAKE_CUDA_API __attribute__((visibility("default")))

extern "C" {
FAKE_CUDA_API CUresult cuInit(unsigned flags);
FAKE_CUDA_API CUresult cuDeviceGet(CUdevice* device, int ordinal);
FAKE_CUDA_API CUresult cuGetErrorName(CUresult error, const char** name);

FAKE_CUDA_API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device);
FAKE_CUDA_API CUresult cuCtxSetCurrent(CUcontext context);
FAKE_CUDA_API CUresult cuCtxGetCurrent(CUcontext* context);
FAKE_CUDA_API CUresult cuCtxPushCurrent_v2(CUcontext context);
FAKE_CUDA_API CUresult cuCtxPopCurrent_v2(CUcontext* context);
FAKE_CUDA_API CUresult cuCtxSynchronize();

FAKE_CUDA_API CUresult cuMemAlloc_v2(CUdeviceptr* memory, size_t bytes);
FAKE_CUDA_API CUresult cuMemFree_v2(CUdeviceptr memory);
FAKE_CUDA_API CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned flags);
FAKE_CUDA_API CUresult cuMemFreeHost(void* memory);
FAKE_CUDA_API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes);
FAKE_CUDA_API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes);

FAKE_CUDA_API CUresult cuStreamCreate(CUstream* stream, unsigned flags);
FAKE_CUDA_API CUresult cuStreamDestroy_v2(CUstream stream);
FAKE_CUDA_API CUresult cuStreamSynchronize(CUstream stream);
FAKE_CUDA_API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes,
                                     CUstream stream);
FAKE_CUDA_API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes,
                                       CUstream stream);
FAKE_CUDA_API CUresult cuLaunchHostFunc(CUstream stream, void (*function)(void*), void* data);
FAKE_CUDA_API CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value,
                                              unsigned flags);
FAKE_CUDA_API CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value,
                                               unsigned flags);

FAKE_CUDA_API CUresult cuThreadExchangeStreamCaptureMode(int* mode);
FAKE_CUDA_API CUresult cuStreamBeginCapture_v2(CUstream stream, int mode);
FAKE_CUDA_API CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph);
FAKE_CUDA_API CUresult cuStreamGetCaptureInfo_v2(CUstream stream, int* status, uint64_t* id,
                                                 CUgraph* graph, const CUgraphNode** dependencies,
                                                 size_t* count);
FAKE_CUDA_API CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph,
                                                   unsigned long long flags);
FAKE_CUDA_API CUresult cuGraphDestroy(CUgraph graph);
FAKE_CUDA_API CUresult cuGraphExecDestroy(CUgraphExec exec);
FAKE_CUDA_API CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream);
}
