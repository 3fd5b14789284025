#include <pybind11/stl.h>

#include "cuda_bindings.h"
#include "npeff/cuda_device.h"

namespace npeff {

namespace py = pybind11;

void bind_cuda_device(py::module_& m) {
  m.def("device_count", &cuda::device_count, "Number of CUDA devices; 0 without a driver.");
  m.def("absence", &cuda::absence, "Why device_count() is 0; empty when it is not.");
  m.def("toolkit", &cuda::toolkit, "Version (major, minor) of the CUDA toolkit that the module was built with.");
  m.def("usable", &cuda::usable, py::arg("device"),
        "Why the kernels cannot run on the device; empty when they can.");
  m.def(
      "devices",
      [] {
        py::list all;
        for (const auto& device : cuda::devices()) {
          py::dict d;
          d["index"] = device.index;
          d["name"] = device.name;
          d["capability"] = py::make_tuple(device.major, device.minor);
          d["memory"] = device.memory;
          all.append(d);
        }
        return all;
      },
      "Each device's index, name, compute capability and memory in bytes.");
}

}  // namespace npeff
