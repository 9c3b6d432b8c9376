"""A conversation: its template, what it forgets, and that a kept prefix changes nothing but the time."""

from collections.abc import Iterator

import pytest

from quikjax.errors import QuikError
from quikjax.generation import Generator
from quikjax.generation.chat import Conversation
from quikjax.testing import tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_model(), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("cache", [None, pytest.param("int8", marks=pytest.mark.long)])
def test_answers_are_those_of_reading_the_conversation_again(cache: str | None, generator: Generator) -> None:
    chatting = generator if cache is None else Generator(tiny_model(), tokenizer=tiny_tokenizer(), cache=cache)
    conversation = Conversation(chatting, template=TEMPLATE, system="s")
    text = "s:s\n"
    for turn, question in enumerate(["hello", "what?", "a longer question, so that the cache must grow beyond its first size"]):
        text += f"u:{question}\na:"
        pieces: list[str] = []
        answer = conversation.ask(question, max_new_tokens=10, on_text=pieces.append)
        assert "".join(pieces) == answer.text
        prompt = list(chatting.tokenizer(text, add_special_tokens=False)["input_ids"])
        assert answer.prompt_tokens == len(prompt)
        assert (answer.reused > 0) == (turn > 0)
        if cache is None:
            whole = chatting.generate([prompt], max_new_tokens=10)
            assert whole.texts == (answer.text,)
        text += f"{answer.text}\n"
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 3]


def test_whole_turns_are_forgotten_and_the_system_message_stays(generator: Generator) -> None:
    conversation = Conversation(
        Generator(tiny_model(), tokenizer=tiny_tokenizer(), context=120, programs=generator.programs),
        template=TEMPLATE,
        system="S",
    )
    dropped = [conversation.ask(f"question {turn}" + "?" * 20, max_new_tokens=12).dropped for turn in range(5)]
    assert sum(dropped) > 0
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", *["user", "assistant"] * (5 - sum(dropped))]
    assert conversation.messages[-2]["content"].startswith("question 4")
    before = list(conversation.messages)
    with pytest.raises(QuikError, match="exceed the context of 120"):
        conversation.ask("x" * 200, max_new_tokens=12)
    assert conversation.messages == before
    conversation.reset("T")
    assert conversation.messages == [{"role": "system", "content": "T"}]


def test_an_interrupted_answer_stays_as_far_as_it_came(generator: Generator) -> None:
    conversation = Conversation(generator, template=TEMPLATE)
    pieces: list[str] = []

    def stop_at_third(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("hello", max_new_tokens=40, on_text=stop_at_third)
    assert conversation.messages[-1]["role"] == "assistant"
    assert conversation.messages[-1]["content"].startswith("".join(pieces[:2]))
    fresh = Conversation(generator, template=TEMPLATE)
    fresh.messages = list(conversation.messages)
    assert conversation.ask("and?", max_new_tokens=8).text == fresh.ask("and?", max_new_tokens=8).text


def test_templates_that_cannot_be_used(generator: Generator) -> None:
    with pytest.raises(QuikError, match="has no chat template, so it is a base model"):
        Conversation(generator)
    with pytest.raises(QuikError, match="the chat template fails: "):
        Conversation(generator, template="{{ raise_exception('no') }}")
    with pytest.raises(QuikError, match="the chat template fails: "):
        Conversation(generator, template="{% for %}")
    with pytest.raises(QuikError, match="makes an empty text"):
        Conversation(generator, template="{# nothing #}")
    with pytest.raises(QuikError, match="has no tokenizer"):
        Conversation(Generator(tiny_model()), template=TEMPLATE)


@pytest.fixture(autouse=True)
def _template_is_given_each_time(generator: Generator) -> Iterator[None]:
    yield
    assert not getattr(generator.tokenizer, "chat_template", None)
