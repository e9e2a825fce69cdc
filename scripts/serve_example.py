#!/usr/bin/env python
"""Start ``colora-ms serve`` over a folder of adapters, talk to it with the openai client, and print what came back.

    mkdir adapters && cp -r runs/quickstart/*/adapter adapters/sums
    python scripts/serve_example.py --adapters adapters --adapter sums

The examples below are printed as Markdown, each with its output; the README shows what one run printed.
"""

import argparse
import contextlib
import io
import subprocess
import sys
from pathlib import Path

from benchmark_common import ROOT

EXAMPLES = [
    '''
from openai import NotFoundError, OpenAI

client = OpenAI(base_url=URL, api_key="none")
print([model.id for model in client.models.list()])
''', '''
question = "State the final answer to the following arithmetic problem: 12 + 30 - 5 ="
for model in (BASE, ADAPTER):
    answer = client.completions.create(model=model, prompt=question, max_tokens=16)
    print(model, repr(answer.choices[0].text), answer.choices[0].finish_reason, answer.usage.total_tokens, "tokens")
''', '''
stream = client.completions.create(model=ADAPTER, prompt=question, max_tokens=16, stream=True,
                                   extra_body={"contrast": {"alpha": 0.1, "beta": 0.5}, "records": True})
for event in stream:
    for record in event.choices[0].records:
        print(repr(record["favourite_text"]), "->" if record["changed"] else "==", repr(record["text"]),
              round(record["best"], 2), round(record["score"], 2))
''', '''
try:
    client.completions.create(model=ADAPTER + "x", prompt=question)
except NotFoundError as error:
    print(error.status_code, error.body["message"])
''',
]


def serve(adapters):
    """(process, URL of the API, the base model's name) of a server on a free port."""
    process = subprocess.Popen([sys.executable, "-m", "colora_ms", "serve", "--adapters", str(adapters), "--port", "0",
                                "--no-warm-up"],
                               stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if line.startswith("serving "):
            words = line.split()
            return process, words[-1] + "/v1", words[1]
    sys.exit("serve_example.py: the server did not start; its message is above")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapter folders")
    parser.add_argument("--adapter", required=True, help="the one to ask")
    arguments = parser.parse_args()
    process, url, base = serve(arguments.adapters.resolve())
    names = {"URL": url, "BASE": base, "ADAPTER": arguments.adapter}
    print("```python")
    try:
        for example in EXAMPLES:
            shown = example.strip().replace("URL", '"http://127.0.0.1:8000/v1"')
            for name in ("BASE", "ADAPTER"):
                shown = shown.replace(name, repr(names[name]).replace("'", '"'))
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                exec(compile(example, "example", "exec"), names)  # the examples above, no one else's code
            output = "".join(f"# {line}\n" for line in text.getvalue().splitlines())
            print(f"{shown}\n{output}", end="", flush=True)
        print("```")
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
