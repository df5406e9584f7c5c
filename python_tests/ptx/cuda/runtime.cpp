// In the place of CUDA's runtime: a launch goes to Python, by the kernel's name in its PTX (cuda_driver.py).
#include <map>
#include <pybind11/pybind11.h>
#include <string>

namespace py = pybind11;

namespace {

struct Size {
  unsigned x, y, z;
};

// By the address of the host's stub.
std::map<const void *, std::string> &kernels() {
  static std::map<const void *, std::string> all;
  return all;
}

constexpr int kUnused = 999;

} // namespace

extern "C" {

void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *, void *, void *,
                            void *, int *) {
  kernels()[host] = name;
}

// Exceptions of Python pass through the backend's code to its caller.
int cudaLaunchKernel(const void *host, Size blocks, Size threads, void **arguments, size_t shared, void *) {
  py::gil_scoped_acquire hold;
  py::module_::import("ptx.cuda_driver")
      .attr("launch")(kernels().at(host), blocks.x, threads.x, reinterpret_cast<uintptr_t>(arguments[0]),
                      shared);
  return 0;
}

int cudaSetDevice(int) { return 0; }
int cudaDriverGetVersion(int *version) { return *version = 0; }
const char *cudaGetErrorName(int) { return "none"; }
const char *cudaGetErrorString(int) { return "none"; }

// What <<<>>> would call, which the backend does not use.
int __cudaGetKernel(void **, const void *) { return kUnused; }
int __cudaLaunchKernel(const void *, Size, Size, void **, size_t, void *) { return kUnused; }
int __cudaPopCallConfiguration(Size *, Size *, size_t *, void *) { return kUnused; }

} // extern "C"
