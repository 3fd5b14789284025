// The bindings of kernels that run in blocks (see block.h) are templates of a Device: where its arrays lie, and how blocks
// are queued. The CUDA module has one, and tests have one that runs blocks on the processor.
#pragma once

#include "common/block.h"
#include "common/csr_view.h"
#include "common/tensor_view.h"

namespace npeff {

template <class Blocks, Place place>
struct Device {
  using Queue = Blocks;  // made from a device's number, the address of the caller's stream there, and the kernel's name
  static constexpr Access read{false, place}, write{true, place};

  // On the one device of all views. Outputs must share memory with none of the others.
  static Queue queue(uintptr_t stream, const char* name, std::initializer_list<const TensorView*> views) {
    const int device = (*views.begin())->device();
    for (const TensorView* view : views)
      if (view->device() != device)
        fail("expected all arguments on one device, got cuda:" + std::to_string(device) + " and cuda:" +
             std::to_string(view->device()));
    check_apart(views);
    return Queue(device, stream, name);
  }
};

// Refuses a workspace (entries,) that is too small.
inline void check_workspace(const TensorView& workspace, int64_t need) {
  if (workspace.shape(0) < need)
    fail("workspace: expected at least " + std::to_string(need) + " entries, got " + std::to_string(workspace.shape(0)));
}

}  // namespace npeff
