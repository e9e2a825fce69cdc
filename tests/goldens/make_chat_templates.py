"""Make tests/goldens/chat_templates.json: what transformers renders with the templates in chat_templates/.

    .venv-peers/bin/python tests/goldens/make_chat_templates.py

The templates are written for these tests in the manner of the models that they are named after.
"""

import json
import os

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, "chat_templates")

WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "The weather <here> & there, in °C", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <\"x\">"}}}
USER, USER2 = {"role": "user", "content": "  Hi & <b>ü</b>  "}, {"role": "user", "content": "2+2?"}
ANSWER, ANSWER2 = {"role": "assistant", "content": "Hello.\n"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief. "}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "21 °C"}

#: name -> (messages, variables)
CONVERSATIONS = {
    "one": ([USER], {}),
    "turns": ([USER, ANSWER, USER2, ANSWER2], {}),
    "open": ([USER, ANSWER, USER2], {}),
    "system": ([SYSTEM, USER, ANSWER], {}),
    "wrong order": ([ANSWER, USER], {}),
    "reasoning": ([USER2, {**ANSWER2, "reasoning_content": "two and two is four"}], {}),
    "tools": ([SYSTEM, USER, {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}, RESULT, ANSWER],
              {"tools": [WEATHER]}),
    "tools, content null": ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT],
                            {"tools": [WEATHER]}),
    "tools, no content": ([USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, dict(RESULT)], {"tools": []}),
    "two calls": ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}], {}),
    "tool gives an object": ([USER, {"role": "assistant", "tool_calls": [CALL]},
                              {"role": "tool", "content": {"celsius": 21, "sky": ["blue", None]}}], {}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ANSWER],
              {}),
    "documents": ([USER], {"documents": [{"title": "T", "text": "x < y"}]}),
    "variables": ([{**USER, "name": "Ann"}, {"role": "skip", "content": "no"}, ANSWER],
                  {"enable_thinking": False, "date_string": "today", "bos_token": "<other>"}),
}


def main():
    from transformers.utils.chat_template_utils import render_jinja_template
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    cases = []
    for file in sorted(os.listdir(FOLDER)):
        with open(os.path.join(FOLDER, file), encoding="utf-8") as opened:
            template = opened.read()
        for name, (messages, variables) in CONVERSATIONS.items():
            for mode in ("open", "closed", "continue"):
                case = {"template": file, "name": name, "mode": mode}
                try:
                    texts, spans = render_jinja_template(
                        [messages], chat_template=template, add_generation_prompt=mode == "open",
                        return_assistant_tokens_mask=mode == "closed" and "generation.jinja" in file,
                        continue_final_message=mode == "continue", **{**special, **variables})
                    case["text"] = texts[0]
                    if spans:
                        case["spans"] = spans[0]
                except Exception as error:
                    case["error"] = type(error).__name__
                cases.append(case)
    with open(os.path.join(HERE, "chat_templates.json"), "w", encoding="utf-8") as file:
        json.dump({"special": special, "conversations": CONVERSATIONS, "cases": cases}, file, ensure_ascii=False,
                  indent=1)
        file.write("\n")
    print(len(cases), "cases,", sum("error" in case for case in cases), "errors,",
          sum("spans" in case for case in cases), "with spans")


if __name__ == "__main__":
    main()
