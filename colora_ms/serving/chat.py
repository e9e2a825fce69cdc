"""A conversation in the terminal over the engine."""

from __future__ import annotations

import sys
from typing import Any, Dict, Iterable, List, Optional, TextIO

from colora_ms.decoding.completion import Completion, changes
from colora_ms.decoding.options import Contrast, Sampling
from colora_ms.errors import ColoraError, DecodingError, UnknownAdapterError, near
from colora_ms.serving.engine import Engine

HELP = {
    "/adapter NAME": "answer with this adapter; /adapter off: with the base model; /adapter: list them",
    "/contrast on|off|ALPHA BETA": "contrast the adapter with the base model (CoLD), or not",
    "/why": "the tokens of the last answer where the contrast changed the choice",
    "/new": "forget the conversation",
    "/help": "this list",
    "/quit": "leave",
}


class Chat:
    """One conversation.

    Args:
        engine: :class:`colora_ms.serving.Engine`.
        name: the base model's name, for messages.
        contrast: what "/contrast on" means.
        sampling: :class:`colora_ms.decoding.Sampling`.
        max_new_tokens: of an answer.
        system: system message, or None.
        plain: send each line as it is, without template and memory; so is a model without a chat template.
        out: text file for everything that is said.
        more: further options of every request, see :class:`colora_ms.decoding.options.Options`; a mix among them gives
            way to a contrast.
    """

    def __init__(self, engine: Engine, name: str = "base", contrast: Optional[Contrast] = None,
                 sampling: Optional[Sampling] = None, max_new_tokens: int = 256, system: Optional[str] = None,
                 plain: bool = False, out: Optional[TextIO] = None,
                 more: Optional[Dict[str, Any]] = None) -> None:
        self.engine = engine
        self.name = name
        self.usual = contrast or Contrast()
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.out = out or sys.stdout
        self.more = dict(more or {})
        self.adapter: Optional[str] = None
        self.contrast: Optional[Contrast] = None
        self.last: Optional[Completion] = None
        self.plain = plain
        if not plain and not getattr(engine.tokenizer, "chat_template", None):
            self.plain = True
            self._say("this model has no chat template: each line is continued as it is")
        self._start: List[Dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._start)

    def loop(self, lines: Iterable[str], prompt: str = "") -> None:
        """Read lines until they end or one is /quit."""
        if prompt:
            self._say(f"{self.name}; /help lists the commands")
        self._write(prompt)
        for line in lines:
            line = line.strip()
            try:
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    self.ask(line)
            except ColoraError as error:
                self._say(str(error))
            self._write(prompt)

    def command(self, line: str) -> bool:
        """Carry out a command; False if it was /quit.

        Raises:
            ColoraError: it cannot be carried out.
        """
        word, *rest = line.split()
        known: Dict[str, Any] = {"/adapter": self._adapter, "/contrast": self._contrast, "/why": self._why,
                                 "/new": self._new, "/help": self._help}
        if word == "/quit":
            return False
        if word not in known:
            raise DecodingError(f"there is no command {word:.40}; /help lists them.{near(word, [*known, '/quit'])}")
        known[word](*rest)
        return True

    def ask(self, text: str) -> None:
        """Say something, and stream the answer.

        Raises:
            ColoraError: it cannot be answered; the conversation stays as it was.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        more = {name: value for name, value in self.more.items() if name != "mix" or self.contrast is None}
        handle = self.engine.submit(text if self.plain else said, adapter=self.adapter, contrast=self.contrast,
                                    sampling=self.sampling, max_new_tokens=self.max_new_tokens, records=True, **more)
        try:
            for part in handle:
                self._write(part)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            handle.cancel()
        completion = handle.result()
        self._say("" if completion.finish_reason == "stop" else f" [{completion.finish_reason}]")
        self.last = completion
        if not self.plain:
            self.messages = [*said, {"role": "assistant", "content": completion.text}]

    # -- commands ----------------------------------------------------------------------------------------------------

    def _adapter(self, name: Optional[str] = None, *more: str) -> None:
        names = [] if self.engine.bank is None else self.engine.bank.names()
        if name is None:
            self._say(f"now: {self.adapter or self.name}; adapters: {', '.join(names) or 'none'}")
            return
        if more:
            raise DecodingError("/adapter takes one name")
        if name == "off":
            self.adapter = self.contrast = None
            self._say(f"answers come from {self.name}")
            return
        if self.engine.bank is None:
            raise UnknownAdapterError("there are no adapters; start with --adapters FOLDER")
        self.engine.bank.resolve(name)
        self.adapter = name
        self._say(f"answers come from {self.name} with {name}")

    def _contrast(self, *values: str) -> None:
        if values == ("off",):
            self.contrast = None
            self._say("contrast off")
            return
        if values == ("on",):
            wanted = self.usual
        else:
            try:
                alpha, beta = (float(v) for v in values)
            except ValueError:
                raise DecodingError("say /contrast on, /contrast off, or /contrast ALPHA BETA, such as "
                                    "/contrast 0.1 0.5") from None
            wanted = Contrast(alpha, beta)
        if self.adapter is None:
            raise DecodingError("a contrast compares an adapter with the base model: choose one with /adapter NAME "
                                "first")
        self.contrast = self.usual = wanted
        self._say(f"contrast: {wanted.label}")

    def _why(self) -> None:
        if self.last is None:
            raise DecodingError("nothing has been answered yet")
        self._say(changes(self.last))

    def _new(self) -> None:
        self.messages = list(self._start)
        self._say("the conversation is forgotten")

    def _help(self) -> None:
        for command, meaning in HELP.items():
            self._say(f"{command:28s} {meaning}")

    def _say(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        print(text, end="", file=self.out, flush=True)
