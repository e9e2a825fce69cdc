"""Memory of a prefill with an adapter a row, for benchmark_serving.py: each form in a process that does nothing else.

    python serving_memory.py        answers questions on standard input (see ``benchmark_common.serve``)

8 rows of 256 tokens go through the model without a cache; the peak of the second run counts. Forms: the multi-adapter
operator, and linears that gather each row's matrices and multiply them in batches. Each is compared with a process that
has loaded the same adapters and runs the same graph without their products.
"""

import sys

import numpy as np

from benchmark_common import ROOT, Worker, measure, peak_bytes, reset_peak, serve, table
from decode_worker import RANK
from serving_load import FIRST_ID, VOCABULARY

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

ROWS, TOKENS = 8, 256
#: The forms of a prefill, and the one without adapters whose graph is otherwise the same.
FORMS = {"operator": "base", "gather": "base, a linear at a time"}


# What stands in the place of LoraLinear's methods; the graph's parser wants functions whose first parameter is
# ``self``.


def _base_operands(self):
    return self.base_layer.operands()


def _base_product(self, x, rows):
    return self.base_layer(x, rows)


def _gather_product(self, x, rows):
    return self.base_layer(x, rows) + low_rank_reference(x, rows[0], self.down, self.up, self.scale)


class Memory:
    """One prefill in one form; the handler of the questions."""

    def run(self, form, adapters, rows=ROWS, tokens=TOKENS):
        """Bytes of the peak of the second prefill."""
        global low_rank_reference  # for _gather_product
        from mindspore import Tensor, nn

        from colora_ms import runtime
        from colora_ms.adapters.lora import LoraLinear
        from colora_ms.kernels.lora import low_rank_reference
        from colora_ms.models import load_model
        from colora_ms.serving import AdapterBank

        class Prefill(nn.Cell):
            def __init__(self, decoder):
                super().__init__()
                self.decoder = decoder

            def construct(self, ids, lengths, slots):
                return self.decoder.hidden(ids, lengths, slots)[:, -1]

        if form != "operator":
            LoraLinear.operands = _base_operands
        if form in ("gather", FORMS["gather"]):
            LoraLinear.fusible = False
            LoraLinear.product = _gather_product if form == "gather" else _base_product
        decoder, _ = load_model(max_positions=tokens)
        decoder.set_train(False)
        bank = AdapterBank(decoder, adapters, max_loaded=rows, max_rank=RANK, host_bytes=1 << 25)
        slots = np.array([bank.lease(bank.resolve(name)).slot for name in bank.names()[:rows]], np.int32)
        graph = Prefill(decoder).set_train(False)
        ids = np.random.default_rng(0).integers(FIRST_ID, VOCABULARY, (rows, tokens)).astype(np.int32)
        arguments = [Tensor(one) for one in (ids, np.full(rows, tokens, np.int32), slots)]
        runtime.run(graph, *arguments).asnumpy()
        reset_peak()
        runtime.run(graph, *arguments).asnumpy()
        return peak_bytes()


def measure_memory(adapters):
    """(measures, {form: peak in bytes}) of the prefill in all forms; adapters: folder of at least 8."""
    peaks = {}
    for form in (*FORMS, *FORMS.values()):
        # Without kept graphs: their key does not know that a form has replaced methods of the Cells.
        worker = Worker([sys.executable, __file__], {"COLORA_COMPILE_CACHE": "0"}, timeout=1800)
        peaks[form] = worker.ask("run", form=form, adapters=str(adapters))
        worker.close()
    extra = {form: peaks[form] - peaks[base] for form, base in FORMS.items()}
    print(table((f"prefill {ROWS} x {TOKENS}", "peak RSS, MiB", "more than without adapters, MiB"), [
        (form, f"{one / 2**20:.0f}", f"{extra[form] / 2**20:.1f}" if form in extra else None)
        for form, one in peaks.items()]), flush=True)
    measures = [measure(f"extra_memory_{form}_mib", value / 2**20, "MiB") for form, value in extra.items()]
    if extra["gather"] <= 0:
        print("extra_memory_vs_gather is left out: the gather form used no more memory than the base", flush=True)
        return measures, peaks
    return [*measures, measure("extra_memory_vs_gather", max(extra["operator"], 0) / extra["gather"], "ratio")], peaks


if __name__ == "__main__":
    serve(Memory())
