"""docs/troubleshoot.md quotes messages as they are printed, and has each that a training loop may meet."""

import re
from pathlib import Path

import pytest
from support.messages import messages

PAGE = Path(__file__).parents[1] / "docs/troubleshoot.md"
QUOTES = re.findall(r"^> `(.+)`$", PAGE.read_text(), re.MULTILINE)
#: Where errors are raised that come of a loop, not of an argument of one call.
FRONT_END = ("nn/", "train/", "optim/", "integrations/", "distributed/", "backends/__init__")
SHORTEST = 20  # letters that a quote must have beside its gaps
EVERY = [text for _, text in messages()]


def is_quoted(text):
    return any(quote in text for quote in QUOTES)


@pytest.mark.parametrize("quote", QUOTES)
def test_what_the_page_quotes_is_in_the_package(quote):
    assert len(quote.replace("...", "")) >= SHORTEST
    assert any(quote in text for text in EVERY)


def test_each_message_is_quoted_once_and_nothing_else_stands_in_a_quote():
    assert len(QUOTES) == len(set(QUOTES)) > 70
    assert [line for line in PAGE.read_text().splitlines() if line.startswith(">")] == [
        f"> `{q}`" for q in QUOTES
    ]


@pytest.mark.parametrize(("where", "text"), list(messages("warning")))
def test_each_warning_is_on_the_page(where, text):
    assert is_quoted(text)


@pytest.mark.parametrize(("where", "text"), [m for part in FRONT_END for m in messages("RuntimeError", part)])
def test_each_error_of_a_training_loop_is_on_the_page(where, text):
    assert is_quoted(text)


def test_messages_are_found():
    assert len(list(messages("warning"))) >= 13
    assert sum(len(list(messages("RuntimeError", part))) for part in FRONT_END) >= 45
    assert not is_quoted("a warning that nobody gives: look away")
