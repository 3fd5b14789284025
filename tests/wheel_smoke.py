"""An installed wheel, without torch: the native modules load and compute, and the CUDA one says what it finds.

python tests/wheel_smoke.py
"""

from __future__ import annotations

import numpy as np

from npeff import _native


def main() -> None:
    x = np.random.default_rng(0).standard_normal((3, 10_000)).astype(np.float32)
    indices, values = np.empty((3, 50), np.int64), np.empty((3, 50), np.float32)
    for name in ("avx512", "avx2", "base"):
        if not _native.use_isa(name):
            continue
        assert _native.topk(x=x, indices=indices, values=values, by_magnitude=True, threads=2) is None
        assert (indices == np.argsort(-np.abs(x), axis=1, kind="stable")[:, :50]).all(), f"top-k differs ({name})"
        print(f"npeff._native: {name} works")
    try:
        from npeff import _cuda
    except ImportError as error:
        print(f"npeff._cuda: not in this wheel ({error})")
        return
    count = _cuda.device_count()
    print(f"npeff._cuda: CUDA {_cuda.toolkit()}, {count} devices{'' if count else ': ' + _cuda.absence()}")


if __name__ == "__main__":
    main()
