"""The HTTP front of the engine: the part of OpenAI's API that a text model needs, and adapters beside it.

    app = create_app(engine, Settings(base_model="smollm2-135m"))    # an ASGI application
    with Server(app, host="127.0.0.1") as server: ...        # in a thread of its own; server.url
    Server(app, port=8000).run()                                     # in this thread, until a signal

| route | what it does |
|---|---|
| POST /v1/completions, /v1/chat/completions, /v1/responses | answers, whole or as server-sent events |
| GET /v1/models, /v1/models/NAME | the base model and the adapters; a request picks one by ``model`` |
| GET, POST /v1/adapters, DELETE /v1/adapters/NAME | list, load (or load anew), withdraw |
| POST /v1/load_lora_adapter, /v1/unload_lora_adapter | the same with vLLM's bodies |
| POST /tokenize, /detokenize, GET /tokenizer_info | ids of a text or a chat, text of ids |
| GET /health, /healthz, /metrics | liveness; Prometheus metrics |

Fields beyond OpenAI's: ``contrast: {alpha, beta, adapt, skip_copies}``, ``top_k``, ``min_p``, ``stop_token_ids``,
``skip_special_tokens``, ``chat_template_kwargs``, ``continue_final_message``, ``priority``, ``ignore_eos`` and
``records``, which returns what the contrast did at each token. A field that would change the answer and is not
implemented is refused, never ignored.

``schema.py`` and ``fields.py`` say what a body may hold, ``conversation.py`` makes the prompt of a chat,
``generate.py`` asks the engine, ``answers.py`` and ``responses.py`` write what comes back, ``calls.py`` reads calls of
tools in it.
"""

from colora_ms.extras import needed

with needed("serve", "serving over HTTP"):
    from colora_ms.serving.http.app import create_app
    from colora_ms.serving.http.server import Server
    from colora_ms.serving.http.settings import Settings

__all__ = ["Server", "Settings", "create_app"]
