"""From texts and conversations to ids. Control tokens come from the chat template, never from what people wrote."""

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from dmpo_lightning.models.families import family_of_tokenizer
from dmpo_lightning.tasks.base import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STAND_INS = range(0xF0000, 0xFFFFE)
"""Characters of the private use area, which no text holds and no template treats in a way of its own."""


def tokenize_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: "str | Sequence[Message]", prefill: str = ""
) -> list[int]:
    """Ids of a conversation in the chat template, with the assistant's turn opened and begun by ``prefill``.

    A plain string is the user's turn. Template and prefill are tokenised together, as one text, because tokens may
    reach across their border. A message that spells a control token, such as an end of turn or the mask, is read as the
    characters that it consists of. Template and prefill may hold control tokens. A conversation whose last turn is the
    assistant's is continued within that turn, as in TRL.

    A tokenizer without a chat template takes plain strings alone, as text too: who needs control tokens around them
    sets one. It adds the special tokens that it puts before a text, and not those behind.

    Raises:
        ValueError: this is no prompt, or the chat template refuses it.
    """
    messages = _checked(prompt)
    if tokenizer.chat_template is not None:
        ids = _chat_ids(tokenizer, messages, prefill)
    elif isinstance(prompt, str):
        ids = _raw_ids(tokenizer, prompt, prefill)
    else:
        raise ValueError(
            "The tokenizer has no chat template, so prompts must be plain strings, got a conversation; set "
            "tokenizer.chat_template."
        )
    if not ids:
        raise ValueError("the prompt is empty, and a completion needs at least one token before it; write a prompt.")
    return ids


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of a text that holds no control token, whatever it spells. Nothing is added on either side.

    Raises:
        ValueError: the tokenizer has no other way to read a part of it than as a control token.
    """
    if not text:
        return []
    controls = control_tokens(tokenizer)
    # Most texts spell no control token. They must be read as ever.
    for options in ({}, {"split_special_tokens": True}):
        ids: list[int] = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        if controls.ids.isdisjoint(ids):
            return ids
    # The token is a word of the vocabulary as well, as `</s>` is in many. Cut up, it is none any more.
    spelled = controls.within_text.search(text)
    if spelled is None or len(spelled.group()) < 2:
        name = tokenizer.convert_ids_to_tokens(next(token for token in ids if token in controls.ids))
        raise ValueError(f"the text holds {name!r}, which this tokenizer knows as a control token alone; remove it.")
    cut = spelled.start() + 1
    return text_ids(tokenizer, text[:cut]) + text_ids(tokenizer, text[cut:])


def warn_of_lost_text(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "Iterable[str | Sequence[Message]]",
    *,
    kind: str = "prompts",
    prefill: str = "",
) -> None:
    """Warns, once for all of them, of texts and conversations of which the tokenizer cannot say a part.

    It reads that as its unknown token, or leaves it out, so that the model answers something else without a word.
    White space does not count, which many tokenizers drop by design.
    """
    # A tokenizer that works on bytes, as nearly all large ones do, can say even these, which no data holds.
    probe = "\U0001f600\u169b\U00012031\ue000"
    if probe in tokenizer.decode(tokenizer(probe, add_special_tokens=False)["input_ids"]):
        return
    # What a prefill spells as a control token is one.
    own = control_tokens(tokenizer).within_text.sub("", prefill)
    texts = [text if isinstance(text, str) else "\n".join(each["content"] for each in text) for text in prompts]
    lost = [_lost_text(tokenizer, text + own) for text in texts]
    if not any(lost):
        return
    first = next(number for number, part in enumerate(lost) if part)
    share = sum(map(len, lost)) / sum(len("".join((text + own).split())) for text in texts)
    logger.warning(
        "%d of %d %s hold text that the tokenizer cannot say and the model is not shown, %.1f %% of all characters; "
        "the first is %s, which loses %s. Use data or a tokenizer that fits.",
        *(sum(map(bool, lost)), len(texts), kind, 100 * share, _shortened(texts[first]), _shortened(lost[first])),
    )


def _lost_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """The characters of a text that no known token stands for."""
    options = {"add_special_tokens": False, "split_special_tokens": True}
    unknown = tokenizer.unk_token_id
    if tokenizer.is_fast:
        read = tokenizer(text, return_offsets_mapping=True, **options)
        found = zip(read["input_ids"], read["offset_mapping"], strict=True)
        spans = [range(*span) for token, span in found if token != unknown]
    else:
        # A tokenizer of Python does not tell where its tokens stand, so it is asked word by word.
        words = [(range(*word.span()), tokenizer(word.group(), **options)) for word in re.finditer(r"\S+", text)]
        spans = [span for span, read in words if read["input_ids"] and unknown not in read["input_ids"]]
    said = set().union(*spans)
    return "".join(each for place, each in enumerate(text) if place not in said and not each.isspace())


@contextmanager
def named(where: str) -> Iterator[None]:
    """Inside, a ValueError says where it was met."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def chat_text(tokenizer: "PreTrainedTokenizerBase", prompt: "str | Sequence[Message]") -> str:
    """The conversation in the tokenizer's chat template, up to the header of the assistant's turn.

    Raises:
        ValueError: the template refuses the conversation, fails, or does not end.
    """
    messages = _checked(prompt)
    try:
        with _of_few_lines():
            # The types of transformers ask for mutable messages, which it does not change.
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)  # type: ignore[arg-type]
    # A template is code, in a sandbox, of whoever wrote the tokenizer.
    except Exception as error:
        roles = [message["role"] for message in messages]
        remedy = "put the system text into the user's turn, or set" if "system" in roles else "change the roles, or set"
        raise ValueError(
            f"the tokenizer's chat template refuses a conversation of the roles {roles}: "
            f"{' '.join(str(error).split()) or type(error).__name__}; {remedy} another tokenizer.chat_template."
        ) from error
    assert isinstance(text, str)
    return text


@contextmanager
def _of_few_lines(most: int = 1_000_000) -> Iterator[None]:
    """Inside, the lines of chat templates are counted, so that one whose loops do not end raises an error.

    Python's own tracing counts them, which needs no second thread and stops in the middle of a loop.
    """
    left = iter(range(most))

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        if next(left, None) is None:
            raise RuntimeError(f"it takes more than {most} lines, and may have no end")
        return on_line

    before = sys.gettrace()
    # Jinja compiles a template to code under this name.
    sys.settrace(lambda frame, *_: on_line if frame.f_code.co_filename == "<template>" else None)
    try:
        yield
    finally:
        sys.settrace(before)


def check_text(text: Any, name: str = "it") -> None:
    """Raises ValueError for what is no text, and for a text with half of a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {_shortened(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is {text[error.start]!r}, half of a surrogate pair, which no text holds; it "
            "comes from a text cut in the middle of a character or a faulty JSON escape, so correct it at its source."
        ) from None


def _checked(prompt: Any) -> Sequence[Message]:
    """A conversation, of a text the user's turn. Raises ValueError for what is neither."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or isinstance(messages, bytes) or not messages:
        raise ValueError(
            "a prompt must be a text, or a conversation: a list of messages with `role` and `content`, got "
            f"{_shortened(prompt)}."
        )
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"a message of a conversation must hold `role` and `content`, got {_shortened(message)}.")
        for name, text in message.items():
            check_text(text, f"the `{name}` of a message")
    return messages


@dataclass(frozen=True)
class ControlTokens:
    """The tokens of a tokenizer that are no text: special tokens and the ends of turns, but for the unknown token."""

    ids: frozenset[int]
    within_text: "re.Pattern[str]"
    """Where a text spells one."""


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> ControlTokens:
    """The control tokens of a tokenizer as it is now."""
    return _control_tokens(tokenizer, len(tokenizer))


# Gathered once for a tokenizer of a certain size and not for every prompt, of which there may be many thousands.
@lru_cache(maxsize=8)
def _control_tokens(tokenizer: "PreTrainedTokenizerBase", size: int) -> ControlTokens:
    vocabulary, family = tokenizer.get_vocab(), family_of_tokenizer(tokenizer)
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    names = {name for name, token in added.items() if token.special} | set(tokenizer.all_special_tokens)
    names |= family.control_tokens if family else set()
    names = {name for name in names if name.strip() and name in vocabulary and name != tokenizer.unk_token}
    # Tokens that are looked for in normalised text may be written in capitals, too.
    patterns = [
        f"(?i:{re.escape(name)})" if name in added and added[name].normalized else re.escape(name)
        # The longest first, as the beginning of a token may be one too.
        for name in sorted(names, key=len, reverse=True)
    ]
    # A pattern of nothing would match everywhere.
    return ControlTokens(frozenset(vocabulary[name] for name in names), re.compile("|".join(patterns) or r"(?!)"))


def _chat_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], prefill: str) -> list[int]:
    hidden, originals = _hidden(tokenizer, messages, prefill)
    begun = hidden.pop()["content"] if hidden[-1]["role"] == "assistant" else ""
    rendered = chat_text(tokenizer, hidden) + begun + prefill
    if originals:
        return _ids_around(tokenizer, rendered, originals)
    # The template has written the special tokens already.
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


def _raw_ids(tokenizer: "PreTrainedTokenizerBase", text: str, prefill: str) -> list[int]:
    """Ids of a text that a completion follows, so that nothing that ends a text, such as BERT's `[SEP]`, is behind."""
    encoded = tokenizer(text + prefill, return_special_tokens_mask=True)
    ids, is_added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    (hidden,), originals = _hidden(tokenizer, [{"content": text}], prefill)
    if originals:
        before = next((position for position, added in enumerate(is_added) if not added), len(ids))
        return ids[:before] + _ids_around(tokenizer, hidden["content"] + prefill, originals)
    while ids and is_added[len(ids) - 1]:
        ids.pop()
    return ids


def _hidden(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], prefill: str
) -> tuple[list[Message], dict[str, str]]:
    """Messages with each control token that they spell hidden behind a single character, and what these characters
    stand for.

    A template may then trim messages or look into them, and the control tokens that are seen afterwards are its own.
    """
    controls = control_tokens(tokenizer)
    texts = [text for message in messages for text in message.values()]
    spelled = sorted({match.group() for text in texts for match in controls.within_text.finditer(text)})
    taken = set(prefill).union(*texts)
    free = (chr(code) for code in STAND_INS if chr(code) not in taken)
    stand_ins = dict(zip(spelled, free, strict=False))
    hidden: list[Message] = [
        {name: controls.within_text.sub(lambda match: stand_ins[match.group()], text) for name, text in message.items()}
        for message in messages
    ]
    return hidden, {character: text for text, character in stand_ins.items()}


def _ids_around(tokenizer: "PreTrainedTokenizerBase", rendered: str, originals: Mapping[str, str]) -> list[int]:
    """Ids of a text whose control tokens count, but for those that are hidden in it."""
    ids: list[int] = []
    for part in re.split(f"([{''.join(originals)}])", rendered):
        if part in originals:
            ids += text_ids(tokenizer, originals[part])
        elif part:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def _shortened(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
