"""Serving: many adapters and many requests at once, in one running batch over one base model.

    bank = AdapterBank(decoder, folder="adapters", max_loaded=8, max_rank=16, host_bytes=1 << 30)
    bank.add("trial", "runs/trial")    # a folder elsewhere, under a name
    bank.names()                       # adapters that a request may name
    bank.load("support")               # read and check it now, or take a new version of it; a failure changes nothing
    bank.unload("support")             # withdraw it: requests that name it are refused until load()
    bank.info()                        # slots, memory, hits and evictions, and an entry for each adapter

    engine = Engine(decoder, tokenizer, bank, rows=16, cache_bytes=1 << 30, chunk=8, queue=256)
    engine.warm_up()                   # compile the graph now, not when it is first met
    handle = engine.submit("Hello", adapter="support", contrast=Contrast(0.1, 0.5), sampling=None, max_new_tokens=64,
                           stop=("\\n\\n",), seed=None, priority=0, timeout=None, records=False)
    for text in handle: ...            # streamed text;  handle.pieces() has the tokens and their records, too
    completion = handle.result(timeout=60)
    handle.cancel()
    engine.stats()                     # counters, queue, memory
    engine.close()

A prompt is a string, a list of token ids, or a list of chat messages. ``submit`` may be called from any thread and
raises at once what can be known at once: UnknownAdapterError (no such adapter), AdapterError (it is broken),
DecodingError (prompt or settings), QueueFullError, EngineClosedError. What comes later is raised by ``result``.

A request's tokens are the same alone and in any mix of neighbours, and what fails (a value, a row, a listener) ends its
own request. One thread, the engine's, runs the graphs; between two calls requests join and leave the batch and
adapters are put into slots. There is one graph, of one shape, for every load: no adapter,
setting or mix of requests compiles anything.
"""

from colora_ms.serving.bank import AdapterBank
from colora_ms.serving.engine import Engine
from colora_ms.serving.handle import Piece, RequestHandle

__all__ = ["AdapterBank", "Engine", "Piece", "RequestHandle"]
