/* The part of AMD's HIP interface that IREE's HIP driver calls: names, numbers and layouts, nothing else.
 *
 * The numbers are those of the HIP 6 headers that IREE 3.13 is built with.  Handles are pointers whose
 * contents are this library's own business.
 */
#ifndef VMFUSE_HIP_ABI_H
#define VMFUSE_HIP_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef int hipError_t;
#define HIP_ERRORS(X)                                                                                       \
  X(hipSuccess, 0, "no error")                                                                              \
  X(hipErrorInvalidValue, 1, "invalid argument")                                                            \
  X(hipErrorOutOfMemory, 2, "out of memory")                                                                \
  X(hipErrorNotInitialized, 3, "initialization error")                                                      \
  X(hipErrorInvalidConfiguration, 9, "invalid configuration argument")                                      \
  X(hipErrorInvalidDevicePointer, 17, "invalid device pointer")                                             \
  X(hipErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")                                \
  X(hipErrorInvalidDeviceFunction, 98, "invalid device function")                                           \
  X(hipErrorInvalidDevice, 101, "invalid device ordinal")                                                   \
  X(hipErrorInvalidImage, 200, "device kernel image is invalid")                                            \
  X(hipErrorInvalidContext, 201, "invalid device context")                                                  \
  X(hipErrorNoBinaryForGpu, 209, "no kernel image is available for execution on the device")                \
  X(hipErrorPeerAccessUnsupported, 217, "peer access is not supported between these two devices")           \
  X(hipErrorInvalidHandle, 400, "invalid resource handle")                                                  \
  X(hipErrorNotFound, 500, "named symbol not found")                                                        \
  X(hipErrorIllegalAddress, 700, "an illegal memory access was encountered")                                \
  X(hipErrorLaunchTimeOut, 702, "the launch timed out and was terminated")                                  \
  X(hipErrorHostMemoryAlreadyRegistered, 712, "part or all of the requested memory range is already mapped")\
  X(hipErrorHostMemoryNotRegistered, 713, "pointer does not correspond to a registered memory region")      \
  X(hipErrorLaunchFailure, 719, "unspecified launch failure")                                               \
  X(hipErrorNotSupported, 801, "operation not supported")                                                   \
  X(hipErrorUnknown, 999, "unknown error")
#define HIP_ENUMERATOR(name, number, text) name = number,
enum { HIP_ERRORS(HIP_ENUMERATOR) };

typedef int hipDevice_t;
typedef void *hipDeviceptr_t;
typedef struct context *hipCtx_t;
typedef struct stream *hipStream_t;
typedef struct event *hipEvent_t;
typedef struct module *hipModule_t;
typedef struct function *hipFunction_t;
typedef struct graph *hipGraph_t;
typedef struct node *hipGraphNode_t;
typedef struct graph_program *hipGraphExec_t;
typedef void (*hipHostFn_t)(void *);
typedef int hipMemcpyKind, hipDeviceAttribute_t, hipFuncAttribute, hipJitOption;

typedef struct {
  uint32_t x, y, z;
} dim3;

typedef struct {
  char bytes[16];
} hipUUID;

enum {
  hipMemcpyHostToHost,
  hipMemcpyHostToDevice,
  hipMemcpyDeviceToHost,
  hipMemcpyDeviceToDevice,
  hipMemcpyDefault
};
enum { hipMemoryTypeHost = 1, hipMemoryTypeDevice = 2 };
enum { hipEventDisableTiming = 2, hipEventKnownFlags = 0x1 | 0x2 | 0x20000000 | 0x40000000 };
enum { hipStreamNonBlocking = 1 };
typedef enum { hipStreamCaptureStatusNone } hipStreamCaptureStatus;
enum { hipMemAttachGlobal = 1 };
/* Portable, mapped, write-combined; non-coherent and the like change nothing that can be seen here. */
enum { hipHostMallocKnownFlags = 0x1 | 0x2 | 0x4 };
enum { hipHostRegisterKnownFlags = 0x1 | 0x2 };

enum {
  hipDeviceAttributeConcurrentManagedAccess = 9,
  hipDeviceAttributeIntegrated = 16,
  hipDeviceAttributeManagedMemory = 24,
  hipDeviceAttributeMaxBlockDimX = 26,
  hipDeviceAttributeMaxBlockDimY = 27,
  hipDeviceAttributeMaxBlockDimZ = 28,
  hipDeviceAttributeMaxGridDimX = 29,
  hipDeviceAttributeMaxGridDimY = 30,
  hipDeviceAttributeMaxGridDimZ = 31,
  hipDeviceAttributeMaxThreadsPerBlock = 56,
  hipDeviceAttributeMultiprocessorCount = 63,
  hipDeviceAttributeMaxSharedMemoryPerBlock = 74,
  hipDeviceAttributeWarpSize = 87,
  hipDeviceAttributeMemoryPoolsSupported = 88
};

enum {
  hipFuncAttributeMaxThreadsPerBlock = 0,
  hipFuncAttributeSharedSizeBytes = 1,
  hipFuncAttributeLocalSizeBytes = 3,
  hipFuncAttributeNumRegs = 4
};

enum { hipJitOptionErrorLogBuffer = 5, hipJitOptionErrorLogBufferSizeBytes = 6 };

typedef struct {
  dim3 blockDim;
  void **extra;
  void *func;
  dim3 gridDim;
  void **kernelParams;
  unsigned int sharedMemBytes;
} hipKernelNodeParams;

typedef struct {
  void *dst;
  unsigned int elementSize;
  size_t height, pitch;
  unsigned int value;
  size_t width;
} hipMemsetParams;

/* One side of a three-dimensional copy; HIP_MEMCPY3D is the source, the destination, and the extent. */
typedef struct {
  size_t xInBytes, y, z, lod;
  int memoryType;
  void *host;
  hipDeviceptr_t device;
  void *array;
  size_t pitch, height;
} hipMemcpySide;

typedef struct {
  hipMemcpySide src, dst;
  size_t widthInBytes, height, depth;
} HIP_MEMCPY3D;

/* hipGetDeviceProperties as it was before HIP 6, which is what the driver asks for. */
typedef struct {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlock;
  int regsPerBlock, warpSize, maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
  int clockRate, memoryClockRate, memoryBusWidth;
  size_t totalConstMem;
  int major, minor, multiProcessorCount, l2CacheSize, maxThreadsPerMultiProcessor, computeMode;
  int clockInstructionRate;
  uint32_t arch;
  int concurrentKernels, pciDomainID, pciBusID, pciDeviceID;
  size_t maxSharedMemoryPerMultiProcessor;
  int isMultiGpuBoard, canMapHostMemory, gcnArch;
  char gcnArchName[256];
  int integrated, cooperativeLaunch, cooperativeMultiDeviceLaunch;
  int maxTexture1DLinear, maxTexture1D, maxTexture2D[2], maxTexture3D[3];
  unsigned int *hdpMemFlushCntl, *hdpRegFlushCntl;
  size_t memPitch, textureAlignment, texturePitchAlignment;
  int kernelExecTimeoutEnabled, ECCEnabled, tccDriver;
  int cooperativeMultiDeviceUnmatched[4];
  int isLargeBar, asicRevision, managedMemory, directManagedMemAccessFromHost, concurrentManagedAccess;
  int pageableMemoryAccess, pageableMemoryAccessUsesHostPageTables;
} hipDeviceProp_tR0000;

_Static_assert(sizeof(hipDeviceProp_tR0000) == 792, "hipDeviceProp_tR0000");
_Static_assert(offsetof(hipDeviceProp_tR0000, gcnArchName) == 396, "hipDeviceProp_tR0000.gcnArchName");
_Static_assert(offsetof(hipDeviceProp_tR0000, managedMemory) == 772, "hipDeviceProp_tR0000.managedMemory");
_Static_assert(sizeof(hipKernelNodeParams) == 64, "hipKernelNodeParams");
_Static_assert(sizeof(hipMemsetParams) == 48, "hipMemsetParams");
_Static_assert(sizeof(HIP_MEMCPY3D) == 184, "HIP_MEMCPY3D");

#endif
