// A libcuda.so.1 that launches nothing and records what Triton's own launcher asks of it.

#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#undef cuCtxGetDevice
#undef cuModuleGetGlobal

enum { kMostLaunches = 64, kMostParameters = 32, kMostModules = 64 };

struct launch {
    char name[64];
    unsigned grid, block, shared_bytes;
    unsigned long long stream;
    unsigned long long parameters[kMostParameters];
};

static struct launch launches[kMostLaunches];
static int launch_count, module_count, parameters_kept;
static int context;

// What the tests ask. `parameters` is how many of a kernel's first ones are kept, eight bytes each.
struct launch* recorded_launch(int number) { return &launches[number]; }
int recorded_launches(void) { return launch_count; }
int recorded_modules(void) { return module_count; }
void record_anew(int parameters) { launch_count = 0, parameters_kept = parameters; }

static CUresult record(CUfunction function, unsigned grid, unsigned block, unsigned shared_bytes, CUstream stream,
                       void** parameters) {
    struct launch* this = &launches[launch_count % kMostLaunches];
    ++launch_count;
    strncpy(this->name, (const char*)function, sizeof this->name - 1);
    this->grid = grid, this->block = block, this->shared_bytes = shared_bytes;
    this->stream = (unsigned long long)stream;
    for (int k = 0; k < parameters_kept && k < kMostParameters; ++k) memcpy(&this->parameters[k], parameters[k], 8);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
    (void)extra;
    return record(function, config->gridDimX, config->blockDimX, config->sharedMemBytes, config->hStream, parameters);
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    (void)image;
    ++module_count;
    *module = (CUmodule)&context;
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    (void)module;
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
    (void)module;
    return CUDA_SUCCESS;
}

// One device, of the size of an H100.
CUresult cuInit(unsigned flags) {
    (void)flags;
    return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
    *version = 13000;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
    *count = 1;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        default: *value = 1;
    }
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* current) {
    *current = (CUcontext)&context;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext current) {
    (void)current;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* primary, CUdevice device) {
    (void)device;
    *primary = (CUcontext)&context;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    (void)function;
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 72
                                                                  : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    (void)function, (void)attribute, (void)value;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    (void)function, (void)config;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    (void)attribute;
    *(CUdeviceptr*)data = pointer;  // whatever it is, it is the device's
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** data, CUdeviceptr pointer) {
    (void)count, (void)attributes, (void)data, (void)pointer;
    return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
    (void)limit;
    *value = 0;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
    (void)limit, (void)value;
    return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    (void)stream;
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
    (void)error;
    *text = "the recording libcuda does not do this";
    return CUDA_SUCCESS;
}
