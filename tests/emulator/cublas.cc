// What kernels/cuda/cublas.cu loads of cuBLAS, for the emulated device; a library of its own, whose
// products are kernels of the program that loads it. Behaviour is cuBLAS's (its documentation:
// cublasSetStream, cublasSetWorkspace, cublasGemmEx), but what nobody here uses is refused.
#include <cuda_runtime.h>

#include <cstring>
#include <set>

struct cublasContext {
  cudaStream_t stream = nullptr;
  bool has_workspace = false;
};

namespace {

constexpr int kSuccess = 0, kInvalidValue = 7, kNotSupported = 15;
constexpr int kTransposed = 1;
constexpr int kBf16 = 14;
constexpr int kSumsOfFp32 = 68;
constexpr int kVersion = 130002;

std::set<const void*> weights_seen;

// C[m, n] = alpha op(A)[m, k] op(B)[k, n] + beta C, stored by columns.
struct Product {
  bool a_transposed, b_transposed;
  int m, n, k;
  float alpha, beta;
  const uint16_t* a;
  int lda;
  const uint16_t* b;
  int ldb;
  uint16_t* c;
  int ldc;
};

float ToFloat(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

void ProductKernel(Product p) {
  if (threadIdx.x > 0) return;
  for (int64_t j = 0; j < p.n; ++j) {
    for (int64_t i = 0; i < p.m; ++i) {
      float sum = 0;
      for (int64_t l = 0; l < p.k; ++l) {
        sum += ToFloat(p.a[p.a_transposed ? i * p.lda + l : l * p.lda + i]) *
               ToFloat(p.b[p.b_transposed ? l * p.ldb + j : j * p.ldb + l]);
      }
      uint16_t& c = p.c[j * p.ldc + i];
      const float value = p.beta == 0 ? p.alpha * sum : p.alpha * sum + p.beta * ToFloat(c);
      c = static_cast<uint16_t>(__float_as_uint(value) >> 16);
    }
  }
}

}  // namespace

extern "C" {

// For tests: how many matrices A there were in all products.
int EmulatedCublasWeights() { return static_cast<int>(weights_seen.size()); }

int cublasCreate_v2(cublasContext** handle) {
  *handle = new cublasContext;
  return kSuccess;
}

int cublasDestroy_v2(cublasContext* handle) {
  delete handle;
  return kSuccess;
}

int cublasGetVersion_v2(cublasContext*, int* version) {
  *version = kVersion;
  return kSuccess;
}

int cublasSetStream_v2(cublasContext* handle, cudaStream_t stream) {
  *handle = {stream, false};
  return kSuccess;
}

int cublasSetWorkspace_v2(cublasContext* handle, void* workspace, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return kInvalidValue;
  handle->has_workspace = workspace != nullptr && bytes >= size_t{32} << 20;
  return kSuccess;
}

int cublasGemmEx(cublasContext* handle, int transa, int transb, int m, int n, int k,
                 const void* alpha, const void* a, int a_type, int lda, const void* b, int b_type,
                 int ldb, const void* beta, void* c, int c_type, int ldc, int compute_type,
                 int algorithm) {
  if (handle->stream == nullptr || !handle->has_workspace) return kNotSupported;
  if (a_type != kBf16 || b_type != kBf16 || c_type != kBf16) return kNotSupported;
  if (compute_type != kSumsOfFp32 || algorithm != -1) return kNotSupported;
  Product product = {transa == kTransposed,
                     transb == kTransposed,
                     m,
                     n,
                     k,
                     0,
                     0,
                     static_cast<const uint16_t*>(a),
                     lda,
                     static_cast<const uint16_t*>(b),
                     ldb,
                     static_cast<uint16_t*>(c),
                     ldc};
  std::memcpy(&product.alpha, alpha, sizeof(float));
  std::memcpy(&product.beta, beta, sizeof(float));
  if (lda < (product.a_transposed ? k : m) || ldb < (product.b_transposed ? n : k) || ldc < m) {
    return kInvalidValue;
  }
  weights_seen.insert(a);
  cudaLaunchConfig_t config;
  config.blockDim = dim3(32);
  config.stream = handle->stream;
  return cudaLaunchKernelEx(&config, ProductKernel, product) == cudaSuccess ? kSuccess
                                                                            : kNotSupported;
}

const char* cublasGetStatusString(int status) {
  return status == kInvalidValue   ? "CUBLAS_STATUS_INVALID_VALUE"
         : status == kNotSupported ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                   : "CUBLAS_STATUS_SUCCESS";
}

}  // extern "C"
