#include <cuda_runtime.h>
#include <dlfcn.h>

#include <vector>

#include "kernels/cuda/cublas.h"

namespace ternion::kernels {
namespace {

// What is used of cuBLAS, written down here so that a build needs no headers of it: values of its
// CUBLAS_STATUS_SUCCESS, CUBLAS_OP_N, and so on (cuBLAS documentation, CUDA 12 and 13: "cuBLAS
// Datatypes Reference", "cuBLAS Helper Function Reference", "cublasGemmEx()").
using Handle = void*;
using Status = int;
constexpr Status kSuccess = 0;
constexpr int kOpN = 0, kOpT = 1;
constexpr int kR16Bf = 14;  // CUDA_R_16BF
constexpr int kCompute32F = 68;
constexpr int kGemmDefault = -1;

struct Functions {
  Status (*create)(Handle*) = nullptr;
  Status (*destroy)(Handle) = nullptr;
  Status (*get_version)(Handle, int*) = nullptr;
  Status (*set_stream)(Handle, cudaStream_t) = nullptr;
  Status (*set_workspace)(Handle, void*, size_t) = nullptr;
  Status (*gemm_ex)(Handle, int transa, int transb, int m, int n, int k, const void* alpha,
                    const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
                    const void* beta, void* c, int c_type, int ldc, int compute_type,
                    int algorithm) = nullptr;
  const char* (*get_status_string)(Status) = nullptr;
};

constexpr int kOldestVersion = 12;

// Newest first. A driver runs what was made for its version of CUDA or an older one, and tells 0
// where there is none (the emulated device, whose streams are no streams).
std::vector<std::string> NamesOfLibraries() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) return {};
  std::vector<std::string> names;
  for (int major = version / 1000; major >= kOldestVersion; --major) {
    names.push_back("libcublas.so." + std::to_string(major));
  }
  if (!names.empty()) names.push_back("libcublas.so");
  return names;
}

// Stays loaded: CUDA's libraries clear up when the process ends.
void* LoadLibrary(const std::string& library, std::string* why) {
  std::vector<std::string> names = NamesOfLibraries();
  if (!library.empty()) names = {library};
  *why = names.empty() ? "no driver for it" : "";
  for (const std::string& name : names) {
    if (void* loaded = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return loaded;
    *why += (why->empty() ? "" : "; ") + std::string(dlerror());
  }
  return nullptr;
}

template <typename F>
bool Find(void* library, const char* name, F* function, std::string* why) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  if (*function == nullptr) *why = std::string("it has no ") + name;
  return *function != nullptr;
}

bool FindAll(void* library, Functions* functions, std::string* why) {
  return Find(library, "cublasCreate_v2", &functions->create, why) &&
         Find(library, "cublasDestroy_v2", &functions->destroy, why) &&
         Find(library, "cublasGetVersion_v2", &functions->get_version, why) &&
         Find(library, "cublasSetStream_v2", &functions->set_stream, why) &&
         Find(library, "cublasSetWorkspace_v2", &functions->set_workspace, why) &&
         Find(library, "cublasGemmEx", &functions->gemm_ex, why) &&
         Find(library, "cublasGetStatusString", &functions->get_status_string, why);
}

class LoadedCublas : public Cublas {
 public:
  explicit LoadedCublas(const Functions& functions) : functions_(functions) {}
  ~LoadedCublas() override {
    if (handle_ != nullptr) functions_.destroy(handle_);
  }

  const char* SetUp(const Executor& executor) {
    if (const char* error = ErrorOf(functions_.create(&handle_))) return error;
    int version = 0;
    if (const char* error = ErrorOf(functions_.get_version(handle_, &version))) return error;
    version_ = std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
               std::to_string(version % 100);
    const cudaStream_t stream = static_cast<cudaStream_t>(executor.stream);
    if (const char* error = ErrorOf(functions_.set_stream(handle_, stream))) return error;
    // Not before the stream, which takes it away. Products would allocate one otherwise, which
    // cannot be recorded; 32 MB are enough of it (cublasSetWorkspace, for Hopper).
    return ErrorOf(
        functions_.set_workspace(handle_, executor.scratch.data(), executor.scratch.size()));
  }

  // Matrices are stored by columns there: its C [outputs, num_rows] is our y by rows, its A, to be
  // transposed, our weights, and its B our x.
  const char* Matmul(const Bf16MatmulArgs& args) override {
    const float one = 1, zero = 0;
    return ErrorOf(functions_.gemm_ex(handle_, kOpT, kOpN, args.outputs, args.num_rows, args.inputs,
                                      &one, args.weights, kR16Bf, args.inputs, args.x, kR16Bf,
                                      args.inputs, &zero, args.y, kR16Bf, args.outputs, kCompute32F,
                                      kGemmDefault));
  }

 private:
  const char* ErrorOf(Status status) const {
    return status == kSuccess ? nullptr : functions_.get_status_string(status);
  }

  const Functions functions_;
  Handle handle_ = nullptr;  // null: not created
};

}  // namespace

std::unique_ptr<Cublas> LoadCublas(const std::string& library, const Executor& executor,
                                   std::string* why) {
  void* const loaded = LoadLibrary(library, why);
  Functions functions;
  if (loaded == nullptr || !FindAll(loaded, &functions, why)) return nullptr;
  auto cublas = std::make_unique<LoadedCublas>(functions);
  if (const char* error = cublas->SetUp(executor)) {
    *why = error;
    return nullptr;
  }
  return cublas;
}

}  // namespace ternion::kernels
