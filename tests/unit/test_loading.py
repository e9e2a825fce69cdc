"""What loading costs: weights that lie in the mapped file, packing by rows, the bar, the forecast of a training."""

import gc
import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor

from colora_ms import runtime
from colora_ms.kernels.aot import KernelError
from colora_ms.kernels.unpack import unpack_rows
from colora_ms.models import build_decoder, builder
from colora_ms.models.checkpoint import open_checkpoint
from colora_ms.models.decoder import Decoder
from colora_ms.models.formats import FORMATS, stored_float
from colora_ms.models.gguf_writer import write_gguf
from colora_ms.models.hf_folder import write_hf_folder
from colora_ms.models.mapped import map_file, parameter_of, release
from colora_ms.models.repack import fast_values, repacked
from colora_ms.training.progress import Progress

TINY = Path(__file__).resolve().parents[1] / "goldens" / "tiny" / "llama"


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny model, in float32 or another type."""
    def write(dtype):
        source = open_checkpoint(TINY)
        return Path(write_hf_folder(tmp_path / dtype, source.config, source.tensors, dtype=dtype))
    return write


def mapped_ranges(path):
    """[(first, last address)] of this process's mappings of a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [tuple(int(n, 16) for n in line.split()[0].split("-")) for line in lines if line.endswith(str(path))]


def resident_kib(path):
    """KiB of a file's mappings that are in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[0].isupper():
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_of_a_model_lie_in_its_mapped_file(folder, dtype):
    path = folder(dtype)
    decoder = build_decoder(open_checkpoint(path), dtype)
    (first, last), = mapped_ranges(path / "model.safetensors")
    matrices = [one for one in decoder.get_parameters() if one.ndim == 2 and not one.name.startswith("rope")]
    assert len(matrices) >= 8
    assert all(first <= one.data_ptr() < last for one in matrices)
    del decoder, matrices
    gc.collect()
    assert not mapped_ranges(path / "model.safetensors")


def test_a_changed_weight_leaves_the_file_and_other_models_as_they_are(folder):
    path = folder("float32")
    file = path / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    one, other = (build_decoder(open_checkpoint(path)) for _ in range(2))
    weight, same = one.lm_head.weight, other.lm_head.weight
    place, value = weight.data_ptr(), float(weight.asnumpy()[0, 0])
    weight[0, 0] = value + 1
    assert weight.data_ptr() == place and float(weight.asnumpy()[0, 0]) == value + 1
    assert float(same.asnumpy()[0, 0]) == value
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


def test_an_array_of_the_callers_is_copied_unless_nobody_can_write_into_it():
    source = open_checkpoint(TINY)
    weights = {name: np.array(source.tensors[name]) for name in source.tensors}
    weights["lm_head.weight"].flags.writeable = False
    decoder = Decoder(source.config, weights)
    places = {one.name: one.data_ptr() for one in decoder.get_parameters()}
    assert places["lm_head.weight"] == weights["lm_head.weight"].ctypes.data
    assert places["model.embed_tokens.weight"] != weights["model.embed_tokens.weight"].ctypes.data
    norm = decoder.model.norm.weight
    before = norm.asnumpy().copy()
    weights["model.norm.weight"][:] = 7
    np.testing.assert_array_equal(norm.asnumpy(), before)


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8", "int32"])
@pytest.mark.parametrize("shape", [(2, 3), (6,), (1, 1)])
def test_a_parameter_has_its_arrays_memory_shape_and_type(shape, dtype):
    array = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    array.flags.writeable = False
    parameter = parameter_of(Tensor.from_numpy(array), "some.weight")
    assert parameter.data_ptr() == array.ctypes.data
    assert (parameter.name, parameter.shape, parameter.requires_grad) == ("some.weight", array.shape, False)
    np.testing.assert_array_equal(parameter.asnumpy(), array)
    assert parameter.asnumpy().dtype == array.dtype and not parameter.sliced


def test_a_parameter_of_an_array_is_what_a_graph_multiplies_with():
    class Product(ms.nn.Cell):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def construct(self, x):
            return ms.ops.matmul(x, self.weight)

    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    product = Product(parameter_of(Tensor.from_numpy(weight), "w", True))
    found = runtime.run(product, Tensor(np.ones((2, 3), np.float32)))
    np.testing.assert_array_equal(found.asnumpy(), np.ones((2, 3)) @ weight)


def test_released_pages_leave_the_memory_and_come_back(tmp_path):
    path = tmp_path / "numbers"
    numbers = np.arange(1 << 20, dtype=np.int32)
    numbers.tofile(path)
    array = map_file(path).view(np.int32)
    assert array.sum(dtype=np.int64) == numbers.sum(dtype=np.int64)
    assert resident_kib(path) == 4096
    release(array[100:-100].reshape(-1, 8))
    assert resident_kib(path) <= 8  # the pages at both ends
    np.testing.assert_array_equal(array, numbers)
    release(numbers)  # lies elsewhere: nothing happens
    release(None)
    assert numbers[-1] == (1 << 20) - 1


def test_an_empty_file_is_mapped_as_no_bytes(tmp_path):
    (tmp_path / "empty").touch()
    assert map_file(tmp_path / "empty").shape == (0,)


@pytest.mark.parametrize("shape", [(7, 64), (3000, 512), (1, 64), (64,)])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4"])
def test_packing_by_rows_gives_the_bits_of_packing_at_once(name, shape):
    wanted = FORMATS[name]
    if len(shape) == 1 and wanted.scaled:
        return
    weight = stored_float(np.random.default_rng(len(shape)).standard_normal(shape, np.float32))
    got, expected = repacked(weight, wanted), weight.as_format(wanted)
    assert (got is weight) == (name == "float32")
    assert got.format is wanted and got.shape == expected.shape and got.activations == expected.activations
    np.testing.assert_array_equal(got.data, expected.data)
    assert (got.scale is None) == (expected.scale is None)
    if got.scale is not None:
        np.testing.assert_array_equal(got.scale, expected.scale)


def test_integers_stay_as_they_are_stored():
    weight = FORMATS["int8"].pack(np.random.default_rng(0).standard_normal((4096, 512), np.float32))
    assert repacked(weight, FORMATS["int4"]) is weight


BLOCK_FORMATS = [name for name, one in FORMATS.items() if one.ggml and one.values > 1]


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_are_unpacked_and_packed_anew_by_the_kernels_to_the_same_bits(name):
    weight = FORMATS[name].pack(np.random.default_rng(0).standard_normal((2100, 512), np.float32))
    np.testing.assert_array_equal(fast_values(weight), weight.values())
    got, expected = repacked(weight, FORMATS["int4"]), weight.as_format(FORMATS["int4"])
    np.testing.assert_array_equal(got.data, expected.data)
    np.testing.assert_array_equal(got.scale, expected.scale)
    assert repacked(weight, None) is weight


def test_blocks_of_another_size_are_refused():
    with pytest.raises(KernelError, match="expected"):
        unpack_rows(FORMATS["q4_k"].tag, np.zeros((3, 144), np.uint8), 512)


def test_the_blocks_of_a_gguf_file_lie_in_it_but_for_reordered_rows(tmp_path):
    source, path = open_checkpoint(TINY), tmp_path / "tiny.gguf"
    write_gguf(path, source.config, source.tensors, kind="Q8_0")
    decoder = build_decoder(open_checkpoint(path))
    (first, last), = mapped_ranges(path)
    inside = {one.name: first <= one.data_ptr() < last for one in decoder.get_parameters()
              if one.ndim == 2 and not one.name.startswith("rope")}
    copied = sorted(name for name, there in inside.items() if not there)
    assert copied and all(name.endswith(("q_proj.weight", "k_proj.weight")) for name in copied)
    assert sum(inside.values()) >= 8


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("patience, terminal, shown", [(0.0, True, True), (1e6, True, False), (0.0, False, False)])
def test_a_bar_is_shown_where_loading_takes_long_at_a_terminal(monkeypatch, patience, terminal, shown):
    monkeypatch.setattr(builder, "_PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    build_decoder(open_checkpoint(TINY))
    said = sys.stderr.getvalue()
    assert ("loading:" in said) == shown
    assert not said or said.endswith("\r")  # the bar goes


def test_the_time_left_of_a_training_does_not_count_updates_that_compiled(monkeypatch):
    """Twelve updates; the first and the fourth compile for a minute, the others take a second each."""
    clock, graphs = [1000.0], [0]
    monkeypatch.setattr(runtime, "all_compilations", lambda: graphs[0])
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(12, 0, True)
    progress.bar._time = lambda: clock[0]
    progress.bar.start_t = clock[0]
    left = []
    for update in range(6):
        compiles = update in (0, 3)
        seconds = 60.0 if compiles else 1.0
        clock[0] += seconds
        graphs[0] += compiles
        progress.show({"loss": 1.0, "tokens": 100, "seconds": seconds})
        state = progress.bar.format_dict
        counted = state["n"] - state["initial"]
        left.append((state["total"] - state["n"]) * state["elapsed"] / counted if counted else None)
    progress.close()
    assert left == [None, 10.0, 9.0, 8.0, 7.0, 6.0]
    assert progress.tokens / progress.seconds == 100
    assert "100 tokens/s" in sys.stderr.getvalue()
