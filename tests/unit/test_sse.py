"""The wire format, to the byte. Section numbers are the WHATWG HTML standard's."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from assistream_flask import sse
from assistream_flask.sse import Decoder, Frame
from tests.conftest import examples

# The encoder


def test_a_frame_is_an_event_line_a_data_line_and_a_blank_line() -> None:
    assert sse.encode("thread.run.created", "{}") == b"event: thread.run.created\ndata: {}\n\n"


def test_an_id_comes_last_so_that_nobody_takes_it_before_its_event() -> None:
    assert sse.encode("ping", "{}", "0a-1") == b"event: ping\ndata: {}\nid: 0a-1\n\n"


def test_an_empty_id_is_written_because_it_resets_the_last_event_id() -> None:
    assert sse.encode("ping", "{}", "") == b"event: ping\ndata: {}\nid: \n\n"


def test_the_empty_string_is_one_empty_data_line() -> None:
    assert sse.encode("e", "") == b"event: e\ndata: \n\n"


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_each_kind_of_line_end_starts_a_new_data_line(end: str) -> None:
    assert sse.encode("e", f"a{end}b") == b"event: e\ndata: a\ndata: b\n\n"


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_a_line_end_at_the_end_is_an_empty_last_line(end: str) -> None:
    assert sse.encode("e", f"a{end}") == b"event: e\ndata: a\ndata: \n\n"


def test_lf_and_cr_in_this_order_are_two_line_ends() -> None:
    assert sse.encode("e", "a\n\rb") == b"event: e\ndata: a\ndata: \ndata: b\n\n"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_what_only_python_calls_a_line_end_stays_in_its_line(character: str) -> None:
    assert sse.encode("e", f"a{character}b") == f"event: e\ndata: a{character}b\n\n".encode()


def test_a_leading_space_of_the_data_survives() -> None:
    assert sse.encode("e", " a") == b"event: e\ndata:  a\n\n"


def test_nul_in_the_data_is_kept() -> None:
    assert sse.encode("e", "a\0b") == b"event: e\ndata: a\0b\n\n"


def test_text_is_utf_8() -> None:
    assert sse.encode("e", "é€😀") == b"event: e\ndata: \xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\n\n"


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b", "\n", "x\r\n"])
def test_an_event_name_or_id_that_cannot_be_written_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="one line without NUL"):
        sse.encode(bad, "")
    with pytest.raises(ValueError, match="one line without NUL"):
        sse.encode("e", "", bad)


def test_retry_is_a_line_of_the_frame_that_follows() -> None:
    assert sse.RETRY + sse.PING == b"retry: 1000\nevent: ping\ndata: {}\n\n"


def test_ping_and_done_are_these_bytes() -> None:
    assert sse.PING == b"event: ping\ndata: {}\n\n"
    assert sse.DONE == b"event: done\ndata: [DONE]\n\n"


def test_the_headers_are_these() -> None:
    assert sse.HEADERS == {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache, no-store, no-transform",
        "X-Content-Type-Options": "nosniff",
        "X-Accel-Buffering": "no",
    }


# A parser written line by line from 9.2.5 and 9.2.6, to compare with


def reference(stream: bytes) -> list[Frame]:
    text = stream.decode("utf-8", "replace")
    if text.startswith("\ufeff"):
        text = text[1:]
    lines = re.split("\r\n|\n|\r", text)
    lines.pop()  # "Once the end of the file is reached, any pending data must be discarded."
    found: list[Frame] = []
    data = event = ""
    for line in lines:
        if line == "":
            if data != "":
                found.append(Frame(event, data[:-1] if data.endswith("\n") else data))
            data = event = ""
        elif line.startswith(":"):
            pass
        else:
            field, value = line, ""
            if ":" in line:
                field, value = line.split(":", 1)
                value = value[1:] if value.startswith(" ") else value
            if field == "event":
                event = value
            elif field == "data":
                data += value + "\n"
    return found


def decoded(chunks: list[bytes]) -> list[Frame]:
    decoder = Decoder()
    return [frame for chunk in chunks for frame in decoder.feed(chunk)]


ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])
LINES = st.one_of(
    st.sampled_from(
        [
            b"",
            b"",
            b"data",
            b"data:",
            b"data: ",
            b"data:  two",
            b"data:a:b",
            b"data : x",
            b"Data: x",
            b"event",
            b"event: e",
            b"event:e",
            b": comment",
            b":",
            b"id: 1-2",
            b"retry: 10",
            b"unknown: x",
            b"nothing",
            b"\xef\xbb\xbfdata: bom",
            "data: é\u2028€😀\x85".encode(),
            b"data: \xe2\x82",
            b"data: \xff\0",
        ]
    ),
    st.binary(max_size=6),
)
STREAMS = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xef\xbb", b"\xef", b"\xef\xbb\xbf\xef\xbb\xbf"]),
    st.lists(st.tuples(LINES, ENDS).map(b"".join), max_size=12).map(b"".join),
    st.sampled_from([b"", b"data: unterminated", b"\r"]),
).map(b"".join)


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[a:b] for a, b in pairwise(edges)]


@settings(max_examples=examples(300), deadline=None)
@given(STREAMS, st.lists(st.integers(0, 200), max_size=8))
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 9, 10, 11])
@example(b"\xef\xbb\xbfdata: a\n\n", [1, 2])
@example(b"data: a\r\n\n", [8, 8, 9])
def test_any_chunk_boundaries_give_what_the_standard_says(stream: bytes, places: list[int]) -> None:
    assert decoded(cut(stream, places)) == reference(stream)


@settings(max_examples=examples(100), deadline=None)
@given(STREAMS, st.lists(st.integers(0, 200), max_size=8))
def test_an_event_that_is_long_is_taken_line_by_line_and_is_the_same(stream: bytes, places: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sse, "_WHOLE_BYTES", 4)
        assert decoded(cut(stream, places)) == reference(stream)


@settings(max_examples=examples(100), deadline=None)
@given(STREAMS)
def test_byte_by_byte_gives_what_the_standard_says(stream: bytes) -> None:
    assert decoded([stream[i : i + 1] for i in range(len(stream))]) == reference(stream)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8")), st.text()), max_size=5))
def test_what_the_encoder_writes_the_decoder_reads_back(told: list[tuple[str, str]]) -> None:
    told = [(event, data.encode("utf-8", "replace").decode()) for event, data in told]
    stream = b"".join(sse.encode(event, data, "0a-1") for event, data in told)
    assert decoded([stream]) == [Frame(event, re.sub("\r\n|\r", "\n", data)) for event, data in told]


@pytest.mark.parametrize("whole", [4, 100_000])
@pytest.mark.parametrize(
    "chunks",
    [[b"data: " + b"a" * 1_200], [b"data: "] + [b"a"] * 1_200, [b"data: a\n"] * 200, [b"event: a\n"] * 200],
)
def test_no_more_is_kept_of_an_event_than_it_may_have(
    chunks: list[bytes], whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "_WHOLE_BYTES", whole)
    decoder = Decoder(1_000)
    with pytest.raises(sse.TooLongError):
        list(map(decoder.feed, chunks))
    decoder = Decoder(1_000)
    for _ in range(100):
        # Whole ones and comments are not kept.
        assert decoder.feed(b"data: %b\n" % (b"a" * 100)) == []
        assert decoder.feed(b": %b\n" % (b"a" * 100)) == []
        assert decoder.feed(b"\n") == [Frame("", "a" * 100)]


# The decoder, rule by rule


def test_lines_may_end_in_cr_lf_or_crlf_in_one_stream() -> None:
    assert decoded([b"event: a\rdata: 1\n\r\ndata: 2\r\r"]) == [Frame("a", "1"), Frame("", "2")]


def test_a_cr_at_the_end_of_a_chunk_ends_its_line_at_once() -> None:
    decoder = Decoder()
    assert decoder.feed(b"data: a\r\r") == [Frame("", "a")]
    assert decoder.feed(b"\ndata: b\n\n") == [Frame("", "b")]


def test_one_byte_order_mark_is_dropped_and_a_second_is_not() -> None:
    assert decoded([b"\xef\xbb\xbfdata: a\n\n"]) == [Frame("", "a")]
    assert decoded([b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n"]) == []


def test_comments_and_unknown_fields_are_skipped() -> None:
    assert decoded([b": hi\nfoo: bar\ndata: a\n:\n\n"]) == [Frame("", "a")]


def test_a_field_without_colon_has_an_empty_value() -> None:
    assert decoded([b"data\n\ndata\ndata\n\nevent: x\nevent\ndata\n\n"]) == [
        Frame("", ""),
        Frame("", "\n"),
        Frame("", ""),
    ]


def test_only_one_space_after_the_colon_is_dropped() -> None:
    assert decoded([b"data:  a\n\ndata:a\n\n"]) == [Frame("", " a"), Frame("", "a")]


def test_an_event_without_data_is_not_dispatched_and_its_name_is_forgotten() -> None:
    assert decoded([b"event: a\n\ndata: b\n\n"]) == [Frame("", "b")]


def test_an_event_without_its_blank_line_is_dropped() -> None:
    assert decoded([b"data: a\n\ndata: b\n"]) == [Frame("", "a")]
    assert decoded([b"data: a\n\ndata: b"]) == [Frame("", "a")]


def test_a_frame_of_data_only_has_no_name() -> None:
    assert decoded([b"data: [DONE]\n\n"]) == [Frame("", "[DONE]")]
