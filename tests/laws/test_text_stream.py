"""Laws of streamed text: however bytes fall into tokens, the pieces add up to the text before the stop."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tongyun.cloud.gateway.text import TextStream

TEXTS = st.text(alphabet="ab.é漢🐍\n", max_size=40)
STOPS = st.lists(st.text(alphabet="ab.é漢", min_size=1, max_size=4), min_size=1, max_size=3)


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    """`data` as tokens that end at the given borders."""
    places = sorted({border % (len(data) + 1) for border in borders} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


def play(tokens: list[bytes], stops: tuple[str, ...]) -> tuple[list[str], bool]:
    stream = TextStream(tokens.__getitem__, stops)
    shown = []
    for token in range(len(tokens)):
        shown.append(stream.feed(token))
        if stream.stopped:
            return shown, True
    return [*shown, stream.end()], stream.stopped


@given(text=TEXTS, borders=st.lists(st.integers(0, 200)))
def test_without_stops_nothing_is_lost(text: str, borders: list[int]) -> None:
    shown, stopped = play(cut(text.encode(), borders), ())
    assert "".join(shown) == text
    assert not stopped


@given(
    text=TEXTS, borders=st.lists(st.integers(0, 200)), stop=st.text(alphabet="ab.é漢", min_size=1, max_size=4)
)
def test_one_stop_string_cuts_where_it_first_begins(text: str, borders: list[int], stop: str) -> None:
    shown, stopped = play(cut(text.encode(), borders), (stop,))
    assert "".join(shown) == text.partition(stop)[0]
    assert stopped == (stop in text)


@given(text=TEXTS, borders=st.lists(st.integers(0, 200)), stops=STOPS)
def test_several_stop_strings(text: str, borders: list[int], stops: list[str]) -> None:
    shown, stopped = play(cut(text.encode(), borders), tuple(stops))
    whole = "".join(shown)
    assert text.startswith(whole)
    assert not any(stop in whole for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    assert stopped or whole == text


@given(data=st.binary(max_size=40), borders=st.lists(st.integers(0, 200)))
def test_broken_utf8_is_replaced_as_in_one_go(data: bytes, borders: list[int]) -> None:
    assert "".join(play(cut(data, borders), ())[0]) == data.decode(errors="replace")
