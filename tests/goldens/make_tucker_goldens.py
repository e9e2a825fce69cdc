"""Make tucker.npz: what TensorLy's ``tucker`` gives for a few tensors. Needs ``pip install tensorly`` (made with
0.10.0).

    python tests/goldens/make_tucker_goldens.py
"""

import os

import numpy as np

CASES = {"matrix": ((9, 7), (3, 3)), "wide": ((4, 11), (2, 2)), "cube": ((5, 6, 7), (2, 3, 2)),
         "four": ((3, 4, 5, 2), (2, 2, 3, 1))}


def tensor_of(name):
    """The input of a case, float64, from a seed of its own."""
    shape = CASES[name][0]
    return np.random.default_rng([11, *shape]).standard_normal(shape)


def main():
    import tensorly
    from tensorly.decomposition import tucker

    found = {}
    for name, (_, ranks) in CASES.items():
        decomposed = tucker(tensor_of(name), rank=list(ranks), init="svd", n_iter_max=1000, tol=1e-14)
        found[name] = tensorly.tucker_to_tensor(decomposed)
    np.savez(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tucker.npz"), **found)


if __name__ == "__main__":
    main()
