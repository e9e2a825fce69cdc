"""Folders of decomposed models: a Hugging Face folder with factors in the place of some weights.

``config.json`` is the base model's with ``model_type`` "colora_low_rank", so that no other program takes it for a
complete model, ``base_model_type``, and ``low_rank``: {"format": 1, "modules": {module: {"rank", "factors"}}}. The tensor
``<module>.weight`` is replaced by ``<module>.inner.weight`` (r, in), ``<module>.core.weight`` (r, r; with three factors
only) and ``<module>.outer.weight`` (out, r).
"""

import os

import numpy as np

from colora_ms.errors import CheckpointError, near

MODEL_TYPE = "colora_low_rank"
ARCHITECTURE = "ColoraLowRankForCausalLM"
FORMAT = 1


def is_low_rank(folder):
    """Whether a folder's config.json says that it holds a decomposed model."""
    from colora_ms.models.hf_folder import read_json

    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return False
    values = read_json(path)
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def factor_shapes(path, shape, rank, factors):
    """{tensor name: shape} of one decomposed module of shape (out, in)."""
    from colora_ms.models.low_rank import CORE, INNER, OUTER

    shapes = {f"{path}.{INNER}": (rank, shape[1])}
    if factors == 3:
        shapes[f"{path}.{CORE}"] = (rank, rank)
    shapes[f"{path}.{OUTER}"] = (shape[0], rank)
    return shapes


def low_rank_shapes(config, modules):
    """All tensors of a decomposed model: {name: shape}; modules: {module: (rank, factors)}."""
    shapes = {}
    for name, shape in config.parameter_shapes().items():
        path = name[:-len(".weight")] if name.endswith(".weight") else None
        if path in modules:
            shapes.update(factor_shapes(path, shape, *modules[path]))
        else:
            shapes[name] = shape
    return shapes


def write_low_rank_folder(path, config, modules, tensors, tokenizer_source=None, dtype="float32", overwrite=False):
    """Write a decomposed model; the folder appears complete or not at all.

    Args:
        path: the folder to make.
        config: the base model's DecoderConfig.
        modules: {module: (rank, factors)}; not empty.
        tensors: mapping of the names of :func:`low_rank_shapes` to arrays, read one at a time.
        tokenizer_source, dtype, overwrite: as in ``write_hf_folder``.

    Raises:
        CheckpointError: as ``write_hf_folder``. Nothing is left behind.
    """
    from colora_ms.models.hf_folder import write_model_folder

    values = config.to_hf()
    values = dict(values, model_type=MODEL_TYPE, architectures=[ARCHITECTURE], base_model_type=values["model_type"],
                  low_rank={"format": FORMAT, "modules": {name: {"rank": int(rank), "factors": int(factors)}
                                                          for name, (rank, factors) in modules.items()}})
    return write_model_folder(path, values, low_rank_shapes(config, modules), tensors, tokenizer_source, dtype,
                              overwrite=overwrite)


def open_low_rank(folder):
    """Open a decomposed model: a ``Checkpoint`` whose ``tensors`` has the products in the place of the factors.

    Raises:
        CheckpointError: damaged or missing files, another format, modules that the model does not have, or tensors that
            do not fit the config; ConfigError as for other folders.
    """
    from colora_ms.models.checkpoint import Checkpoint, LazyTensors, check_shapes, tokenizer_in
    from colora_ms.models.config import ARCHITECTURES
    from colora_ms.models.hf_folder import SafetensorsFolder, find_weights, parse_config, read_json

    file = os.path.join(folder, "config.json")
    values = read_json(file)
    base = values.get("base_model_type")
    known = ARCHITECTURES.get(base) if isinstance(base, str) else None
    config = parse_config(folder, file, dict(values, model_type=base, architectures=[known] if known else None))
    modules = _modules(file, values.get("low_rank"), config)
    files = find_weights(folder)
    if files is None:
        raise CheckpointError(f"{folder} has a config.json but no model.safetensors")
    store = SafetensorsFolder(files)
    check_shapes(store.shapes, low_rank_shapes(config, modules), folder)
    store.check_dtypes(store.shapes)

    def reader(path):
        names = factor_shapes(path, (0, 0), *modules[path])
        return lambda: {name[len(path) + 1:]: store.read(name) for name in names}

    readers = {path: reader(path) for path in modules}

    def read(name):
        path = name[:-len(".weight")] if name.endswith(".weight") else None
        if path not in readers:
            return store.read(name)
        parts = list(readers[path]().values())  # inner, (core,) outer
        return np.linalg.multi_dot(parts[::-1]) if len(parts) == 3 else parts[1] @ parts[0]

    return Checkpoint(folder, "low-rank", config, LazyTensors(config.parameter_shapes(), read), tokenizer_in(folder),
                      low_rank=readers)


def put_factors(decoder, readers):
    """Replace linears of a decoder by their factors.

    Args:
        decoder: built from the products; readers: ``Checkpoint.low_rank``.
    """
    from colora_ms.models.low_rank import low_rank_linear
    from colora_ms.models.replacing import replace_cells

    linears = {name: cell for name, cell in decoder.cells_and_names() if name in readers}
    replace_cells(decoder, {path: low_rank_linear(path, read(), decoder.weight_format,
                                                  linears[path].bias if linears[path].has_bias else None)
                            for path, read in readers.items()})


def parameter_count(checkpoint):
    """Weights of a decomposed model as it is stored."""
    total = checkpoint.config.parameter_count()
    shapes = checkpoint.config.parameter_shapes()
    for path, read in checkpoint.low_rank.items():
        total += sum(value.size for value in read().values()) - int(np.prod(shapes[f"{path}.weight"]))
    return total


def _modules(file, values, config):
    """{module: (rank, factors)} of a config's ``low_rank``, checked against the model's linears."""
    if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("modules"), dict):
        raise CheckpointError(f"{file}: low_rank is {values!r:.80}, expected a mapping with format {FORMAT} and modules; the "
                              "folder may have been written by a newer version")
    shapes = config.parameter_shapes()
    linears = {name[:-len(".weight")]: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    problems, modules = [], {}
    for path, entry in values["modules"].items():
        if path not in linears:
            problems.append(f"{path!r:.100} is no linear of the model.{near(path, linears, 1)}")
            continue
        rank, factors = (entry.get("rank"), entry.get("factors")) if isinstance(entry, dict) else (None, None)
        limit = min(linears[path])
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit or factors not in (2, 3):
            problems.append(f"{path} has {entry!r:.80}, expected a rank from 1 to {limit} and 2 or 3 factors")
            continue
        modules[path] = (rank, factors)
    if not problems and not modules:
        problems.append("it names no module")
    if problems:
        more = f" ({len(problems) - 1} more)" if problems[1:] else ""
        raise CheckpointError(f"{file}: low_rank cannot be used: {problems[0]}{more}")
    return modules
