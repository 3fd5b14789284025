// npeff._cuda: table of contents.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "npeff/cuda_device.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of npeff. Imports without a driver: device_count() is 0 then.";

  m.def("device_count", &npeff::cuda::device_count, "Number of CUDA devices; 0 without a driver.");
  m.def("absence", &npeff::cuda::absence, "Why device_count() is 0; empty when it is not.");
  m.def(
      "devices",
      [] {
        py::list all;
        for (const auto& device : npeff::cuda::devices()) {
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
