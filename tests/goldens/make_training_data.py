"""Make the folder tests/goldens/training_data: the ids that transformers gives for lines of training data.

    .venv-peers/bin/python tests/goldens/make_training_data.py

``LINES`` holds lines as people have them; beside each stands, written by hand, the conversation that it means, in the
form that transformers' templates take. The templates are those of chat_templates/. ``cases.json`` holds, for both
tokenizers, all templates and all conversations, what ``apply_chat_template(messages, tools=tools, tokenize=True)``
gives, and which of its tokens are learned: those that hold characters of its generation blocks where the template has
them, else from the end of the generation prompt to the end of the turn's last token, ``ENDS``.
"""

import json
import os

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, "training_data")

#: template -> what ends an assistant's turn
ENDS = {"chatml": "<|im_end|>", "chatml_generation": "<|im_end|>", "gemma": "<end_of_turn>", "llama31": "<|eot_id|>",
        "mistral": "</s>", "plain_generation": "</s>", "qwen25": "<|im_end|>", "qwen3": "<|im_end|>"}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>"]
CORPUS = ["the little girl named Lily said: the little dog is here",
          "Answer: the weather in Paris\nAnswer: of the of the",
          "user assistant system tool You are helpful. think <think>\n\n</think>\n\n",
          '{"name": "weather", "arguments": '
          '{"city": "Paris"}}', "Ünïcödé é è café naïve 21 °C", "a  b   c", "1 22 333 4444\n\n"] * 20

SYSTEM, USER, AGAIN = ({"role": role, "content": text} for role, text in
                       (("system", "Be brief."), ("user", "2 + 2?"), ("user", "And 3 + 3?")))
FOUR, SIX = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "It is 6.\n\nSix é"}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather in °C", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
ASKED = {"role": "user", "content": "How warm is it in Paris?"}


def call(content, arguments, **more):
    """An assistant's message with a call."""
    return {"role": "assistant", "content": content, **more,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]}


RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "21"}
WARM = {"role": "assistant", "content": "It is 21 °C."}
THOUGHT = {**FOUR, "reasoning_content": "two and two is four"}

#: name -> (the line, the conversation(s) that it means, tools, how many messages the last answer has)
LINES = {
    "completion": ({"prompt": "2 + 2?", "completion": "4", "id": 7}, [USER, FOUR], None, 1),
    "completion messages": ({"prompt": [SYSTEM, USER], "completion": [FOUR]}, [SYSTEM, USER, FOUR], None, 1),
    "completion of several messages": (
        {"prompt": [ASKED], "completion": [call("", '{"city": "Paris"}'), RESULT, WARM], "tools": [WEATHER]},
        [ASKED, call("", {"city": "Paris"}), RESULT, WARM], [WEATHER], 3),
    "openai": ({"messages": [USER, FOUR, AGAIN, SIX], "tools": None}, [USER, FOUR, AGAIN, SIX], None, 1),
    "openai with tools": (
        {"messages": [SYSTEM, ASKED, call("Wait.", '{"city":"Paris", "unit":null}', name=None), RESULT, WARM],
         "tools": [WEATHER]},
        [SYSTEM, ASKED, call("Wait.", {"city": "Paris", "unit": None}), RESULT, WARM], [WEATHER], 1),
    "openai ends with a call": ({"messages": [ASKED, call(None, '{"city": "Paris"}')], "tools": [WEATHER]},
                                [ASKED, call("", {"city": "Paris"})], [WEATHER], 1),
    "openai with reasoning": ({"messages": [USER, THOUGHT, AGAIN, {**SIX, "reasoning_content": "double it"}]},
                              [USER, THOUGHT, AGAIN, {**SIX, "reasoning_content": "double it"}], None, 1),
    "openai with parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 2?"}]},
                      {**FOUR, "content": [{"type": "text", "text": "4"}]}]}, [USER, FOUR], None, 1),
    "openai, older names": (
        {"messages": [ASKED, {"role": "assistant", "content": None, "function_call": {
            "name": "weather", "arguments": '{"city": "Paris"}'}},
            {"role": "function", "name": "weather", "content": "21"},
            WARM], "functions": [WEATHER["function"]]},
        [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
            "name": "weather", "arguments": {"city": "Paris"}}}]}, {"role": "tool", "name": "weather", "content": "21"},
         WARM], [WEATHER], 1),
    "sharegpt": ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"},
                                    {"from": "human", "value": "And 3 + 3?"},
                                    {"from": "gpt", "value": "It is 6.\n\nSix é"}]}, [USER, FOUR, AGAIN, SIX], None, 1),
    "sharegpt with a system column": (
        {"system": "Be brief.", "conversations": [{"role": "user", "content": "2 + 2?"},
                                                  {"role": "assistant", "content": "4"}]}, [SYSTEM, USER, FOUR],
        None, 1),
    "sharegpt with tools": (
        {"conversations": [{"from": "human", "value": "How warm is it in Paris?"},
                           {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
                           {"from": "observation", "value": "21"}, {"from": "gpt", "value": "It is 21 °C."}],
         "tools": json.dumps([WEATHER], ensure_ascii=False)},
        [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
            "name": "weather", "arguments": {"city": "Paris"}}}]}, {"role": "tool", "content": "21"}, WARM],
        [WEATHER], 1),
    "alpaca": ({"instruction": "2 + 2?", "input": "", "output": "4", "text": "Below is an instruction"},
               [USER, FOUR], None, 1),
    "alpaca with input": ({"instruction": "Add.", "input": "2 + 2", "output": "4"},
                          [{"role": "user", "content": "Add.\n\n2 + 2"}, FOUR], None, 1),
    "preference": ({"prompt": "2 + 2?", "chosen": "4", "rejected": "It is 6.\n\nSix é"},
                   [[USER, FOUR], [USER, SIX]], None, 1),
    "preference messages": ({"prompt": [SYSTEM, USER], "chosen": [FOUR], "rejected": [SIX]},
                            [[SYSTEM, USER, FOUR], [SYSTEM, USER, SIX]], None, 1),
    "preference, implicit prompt": ({"chosen": [USER, FOUR], "rejected": [USER, SIX], "score": 0.5},
                                    [[USER, FOUR], [USER, SIX]], None, 1),
}
TEXTS = ["The little girl named Lily.", " Ünïcödé\n\n1 22 333 é"]


def tokenizers():
    """name -> transformers tokenizer: a byte-level one, and one with SentencePiece's blanks; both put <s> in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    begin = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    byte = Tokenizer(models.BPE())
    byte.pre_tokenizer, byte.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    byte.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    piece = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    piece.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    piece.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    piece.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False, limit_alphabet=70))
    made = {}
    for name, backend in (("byte_level", byte), ("sentencepiece", piece)):
        backend.post_processor = begin
        made[name] = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        backend.save(os.path.join(FOLDER, f"{name}.json"), pretty=False)
    return made


def learned(tokenizer, messages, tools, turns, end):
    """(ids, mask) of a conversation; mask tells which tokens of the turns are learned. None if prefixes differ."""
    def render(part, generation=False):
        return tokenizer.apply_chat_template(part, tools=tools, tokenize=False, add_generation_prompt=generation)

    ids = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True)
    text, mask = render(messages), [0] * len(ids)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == ids
    for k in turns:
        upto, head = render(messages[:k + 1]), render(messages[:k], True)
        if not (text.startswith(upto) and upto.startswith(head)):
            return None
        stop = text.index(end, len(head)) + len(end)
        for place, (first, last) in enumerate(encoded["offset_mapping"]):
            if first < stop and last > len(head):
                mask[place] = 1
    return ids, mask


def runs(mask):
    """The (begin, end) of the stretches of ones."""
    edges = [place for place in range(len(mask) + 1)
             if (mask[place] if place < len(mask) else 0) != (mask[place - 1] if place else 0)]
    return list(zip(edges[::2], edges[1::2]))


def by_blocks(tokenizer, messages, tools, turns):
    """(ids, mask) by the places of generation blocks that transformers finds, reduced to the turns.

    Its own mask leaves out the later tokens of a last character that has several (byte tokens), so it is not taken.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template([messages], tools=tools, chat_template=tokenizer.chat_template,
                                         return_assistant_tokens_mask=True, **tokenizer.special_tokens_map)
    ids = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True)
    encoded = tokenizer(texts[0], add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == ids
    said = [k for k, item in enumerate(messages) if item["role"] == "assistant"]
    assert len(spans[0]) == len(said)
    kept = [span for k, span in zip(said, spans[0]) if k in turns]
    return ids, [int(any(first < end and last > begin for begin, end in kept))
                 for first, last in encoded["offset_mapping"]]


def case(tokenizer, template, messages, tools, last):
    """``{"last": [[ids, [[begin, end] of learned tokens, ...]], ...], "all": ...}`` or ``{"error": ...}``."""
    said = [k for k, item in enumerate(messages) if item["role"] == "assistant"]
    made = {}
    for loss, turns in (("last", [k for k in said if k >= len(messages) - last]), ("all", said)):
        try:
            if "generation" in template:
                found = [by_blocks(tokenizer, messages, tools, turns)]
            else:
                found = [learned(tokenizer, messages, tools, turns, ENDS[template])]
                if found == [None]:  # one example a turn
                    found = [learned(tokenizer, messages[:k + 1], tools, [k], ENDS[template]) for k in turns]
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:80]}
        assert None not in found
        made[loss] = [(ids, runs(mask)) for ids, mask in found]
    return made


def main():
    os.makedirs(FOLDER, exist_ok=True)
    cases, texts = [], {}
    for kind, tokenizer in tokenizers().items():
        texts[kind] = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
        for template in ENDS:
            with open(os.path.join(HERE, "chat_templates", template + ".jinja"), encoding="utf-8") as file:
                tokenizer.chat_template = file.read()
            for name, (_, said, tools, last) in LINES.items():
                many = said if isinstance(said[0], list) else [said]
                cases.append({"tokenizer": kind, "template": template, "line": name,
                              "made": [case(tokenizer, template, one, tools, last) for one in many]})
    with open(os.path.join(FOLDER, "cases.json"), "w", encoding="utf-8") as file:
        json.dump({"lines": {name: line for name, (line, *_) in LINES.items()}, "texts": TEXTS, "text_ids": texts},
                  file, ensure_ascii=False, indent=1)
        file.seek(file.tell() - 2)  # the cases, one a line
        file.write(',\n "cases": [\n')
        file.write(",\n".join("  " + json.dumps(one, ensure_ascii=False, separators=(",", ":")) for one in cases))
        file.write("\n ]\n}\n")
    print(len(cases), "cases,", sum("error" in one for case in cases for one in case["made"]), "errors")


if __name__ == "__main__":
    main()
