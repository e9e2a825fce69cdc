"""Step 3, in a process of its own: MindSpore's run_check, and a product of each half type against NumPy."""
import argparse

import child
import numpy as np


def product(ms, dtype):
    """The relative error of one built-in product."""
    rng = np.random.default_rng(0)
    a, b = (ms.Tensor(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in ((33, 256), (256, 48)))
    want = a.astype(ms.float32).asnumpy().astype(np.float64) @ b.astype(ms.float32).asnumpy().astype(np.float64)
    got = ms.ops.matmul(a, b).astype(ms.float32).asnumpy()
    return float(np.abs(got - want).max() / np.abs(want).max())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="Ascend")
    options = parser.parse_args()
    import mindspore as ms

    ms.set_device(options.target)
    with child.reported("run_check"):
        ms.run_check()
    # A CPU has no bfloat16 product.
    for dtype, step in ((ms.float16, 2.0 ** -10), *([(ms.bfloat16, 2.0 ** -7)] if options.target == "Ascend" else [])):
        with child.reported(f"product {dtype}") as line:
            error = product(ms, dtype)
            line["note"] = f"error {error:.1e}"
            if not error <= 2 * step:
                line["wrong"] = f"relative error {error:.3g}, allowed {2 * step:.3g}"


if __name__ == "__main__":
    main()
