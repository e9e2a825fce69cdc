"""Makes gguf_noise.npz: matrices, and their blocks in llama.cpp's K-quants by ggml's own quantisers.

    .venv-peers/bin/python tests/goldens/make_gguf_noise.py

Needs llama-cpp-python, whose library holds ggml's quantisers; the gguf package can only read these types.
"""

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def main():
    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.joinpath("lib").glob("libggml-base.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
                                            ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    random = np.random.default_rng(5)
    matrices = {"normal": random.standard_normal((6, 256)), "heavy": random.standard_t(2, (6, 256)),
                "uneven": random.standard_normal((6, 256)) * np.repeat(10.0 ** random.uniform(-3, 0, (6, 8)), 32, 1)}
    found = {}
    for name, matrix in matrices.items():
        matrix = np.ascontiguousarray(matrix, np.float32)
        found[name] = matrix
        importance = np.ascontiguousarray(random.uniform(0.1, 3, matrix.shape[1]), np.float32)
        for kind in KINDS:
            number = gguf.GGMLQuantizationType[kind]
            block, size = gguf.GGML_QUANT_SIZES[number]
            for suffix, weights in (("", None), ("_weighted", importance.ctypes.data)):
                out = np.zeros((matrix.shape[0], matrix.shape[1] // block * size), np.uint8)
                library.ggml_quantize_chunk(int(number), matrix.ctypes.data, out.ctypes.data, 0, *matrix.shape, weights)
                found[f"{name}.{kind}{suffix}"] = out
    np.savez_compressed(Path(__file__).with_name("gguf_noise.npz"), **found)


if __name__ == "__main__":
    main()
