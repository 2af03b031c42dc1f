"""Messages are printable, short, and never fail themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cfsp_framework.errors import LONGEST_MESSAGE, ConfigError, one_line, printable


class Unreadable(Exception):
    """An error whose message cannot be read."""

    def __str__(self) -> str:
        raise RuntimeError("no message")


@given(st.text(max_size=3 * LONGEST_MESSAGE))
def test_a_message_holds_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert all(character == "\n" or character.isprintable() for character in shown)
    assert len(shown) < 10 * LONGEST_MESSAGE + 100
    if text.isprintable() and len(text) <= LONGEST_MESSAGE:
        assert shown == text


def test_an_error_is_one_short_line() -> None:
    assert one_line(ConfigError("a\n b")) == "a b"
    assert one_line(ValueError("\x1b[2J")) == "ValueError: \\x1b[2J"
    assert len(one_line(ValueError("x" * 10_000_000))) < LONGEST_MESSAGE + 100
    assert "cannot be read (RuntimeError)" in one_line(Unreadable())
