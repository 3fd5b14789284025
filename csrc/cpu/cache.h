#pragma once

#include <unistd.h>

#include <cstdint>

namespace npeff {

// Bytes of a core's own second-level cache; 512 KiB when the system does not say.
inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size >= 1 << 17) return size;
#endif
  return 1 << 19;
}

}  // namespace npeff
