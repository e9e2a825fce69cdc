"""llama.cpp's side of check_llama_cpp.py: greedy tokens and ids of texts, by llama-cpp-python.

    .venv-peers/bin/python scripts/peers_llama_cpp.py < job.json

The job is {"model": file, "lora": file or null, "prompts": [[ids]], "texts": [str], "tokens": number, "threads": number
(1 if left out), "logits": true or false}; the answer is
{"answers": [[ids]], "ids": [[ids of a text]], "logits": [[of the last token of a prompt]]} as one line of JSON.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def log(level, text, data):
    """Warnings and errors go to the standard error."""
    del data
    if level >= 3 and sys is not None:
        sys.stderr.write(text.decode("utf-8", "replace"))


def main():
    job = json.load(sys.stdin)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    longest = max((len(prompt) for prompt in job["prompts"]), default=1) + job["tokens"] + 1
    threads = job.get("threads", 1)
    model = llama_cpp.Llama(job["model"], n_ctx=max(longest, 16), n_batch=512, n_threads=threads,
                            n_threads_batch=threads, verbose=False, lora_path=job.get("lora"), flash_attn=False,
                            type_k=0, type_v=0, seed=1)
    answers, logits = [], []
    for prompt in job["prompts"]:
        model.reset()
        tokens = []
        model.eval(prompt)
        for _ in range(job["tokens"]):
            scores = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).copy()
            if not tokens:
                logits.append([float(value) for value in scores] if job.get("logits") else [])
            tokens.append(int(scores.argmax()))
            model.eval(tokens[-1:])
        answers.append(tokens)
    ids = [model.tokenize(text.encode("utf-8"), add_bos=True, special=True) for text in job.get("texts", [])]
    model.close()  # while the interpreter, and with it the log's callback, is still whole
    print(json.dumps({"answers": answers, "ids": ids, "logits": logits}))


if __name__ == "__main__":
    main()
