"""Are trace files read as they are written, and is a bad row named by its line?"""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from orchestrator.demo.trace import TraceError, TraceRow, parse_trace, read_trace

HEADER = "arrival_s,input_tokens,output_tokens"


def test_csv_rows_are_read_in_order_of_arrival() -> None:
    rows = parse_trace([HEADER, "2.5,10,20", "0.0,374,44", ""], "t.csv")
    assert rows == (TraceRow(0.0, 374, 44), TraceRow(2.5, 10, 20))


def test_csv_columns_may_stand_in_another_order_and_have_neighbours() -> None:
    rows = parse_trace(["id,output_tokens,arrival_s,input_tokens", "a,3,1.0,2"], "t.csv")
    assert rows == (TraceRow(1.0, 2, 3),)


def test_jsonl_rows_are_read_and_unknown_keys_are_passed_over() -> None:
    rows = parse_trace(['{"arrival_s":3,"input_tokens":6,"output_tokens":5,"hash_ids":[0,1]}'], "t.jsonl")
    assert rows == (TraceRow(3.0, 6, 5),)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER, "0.0,1,1", "x,1,1"], "t:3: arrival_s is 'x'"),
        ([HEADER, "0.0,1.5,1"], "t:2: input_tokens is '1.5'"),
        ([HEADER, "", "0.0,1"], "t:3: 2 columns where the header has 3"),
        ([HEADER, "-1,1,1"], "t:2: arrival_s is -1.0"),
        ([HEADER, "nan,1,1"], "t:2: arrival_s is nan"),
        ([HEADER, "0,0,1"], "t:2: input_tokens is 0"),
        ([HEADER, "0,1,99999999999"], "t:2: output_tokens is 99999999999"),
        (["arrival,input_tokens,output_tokens", "0,1,1"], "t:1: the header lacks arrival_s"),
        ([HEADER], "t: the trace has a header but no rows"),
        ([], "t: the trace is empty"),
        (['{"arrival_s":0,"input_tokens":1,"output_tokens":1}', '{"arrival_s":0,'], "t:2: "),
        (['{"arrival_s":0,"input_tokens":"many","output_tokens":1}'], "t:1: "),
        (['{"arrival_s":0,"input_tokens":1}'], "t:1: "),
        (['{"arrival_s":0,"input_tokens":1,"output_tokens":-4}'], "t:1: output_tokens is -4"),
    ],
)
def test_a_malformed_trace_is_one_line_that_says_where_and_what(lines: list[str], message: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_trace(lines, "t")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_plain_and_gzipped_files_give_the_same_rows(tmp_path: Path) -> None:
    text = f"{HEADER}\n0.5,7,8\n".encode()
    (tmp_path / "a.csv").write_bytes(text)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(text))
    assert read_trace(tmp_path / "a.csv") == read_trace(tmp_path / "b.csv.gz") == (TraceRow(0.5, 7, 8),)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", gzip.compress(b"x" * 1000, mtime=0)[:20], b"\x1f\x8bno"])
def test_a_file_that_is_no_text_or_a_damaged_gzip_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(TraceError) as caught:
        read_trace(tmp_path / "bad")
    assert str(caught.value).startswith(str(tmp_path / "bad")) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read the trace"):
        read_trace(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        ("azure2023_code.csv.gz", 7_519),
        ("azure2023_conv.csv.gz", 14_864),
        ("mooncake_conversation.jsonl.gz", 8_292),
    ],
)
def test_the_real_traces_are_read_whole(data_dir: Path, name: str, num_rows: int) -> None:
    rows = read_trace(data_dir / "traces" / name)
    assert len(rows) == num_rows
    assert rows[0].arrival_s == 0.0
