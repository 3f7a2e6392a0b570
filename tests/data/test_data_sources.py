import pytest

from dmpo_lightning.data import sources
from dmpo_lightning.data.sources import HeldOutSplits, Parser, hub_loader, load_file, local_loader


def parse(row):
    return {"n": int(row["n"])}


def test_jsonl_csv_and_parquet_hold_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n{"n": 2}\n')
    (tmp_path / "a.csv").write_text("n\n1\n2\n")
    parquet.write_table(pyarrow.table({"n": [1, 2]}), tmp_path / "a.parquet")
    for suffix in sources.SUFFIXES:
        assert load_file(tmp_path / f"a{suffix}", Parser(parse, ("n",))) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"n": 1}\n{"n"\n', r"a\.jsonl, line 2: not JSON .*; mend or remove"),
        ("a.jsonl", '{"m": 1}\n', r"row 1: column 'n' is missing, there are \['m'\]"),
        ("a.jsonl", '{"n": "x"}\n', r"row 1: invalid literal"),
        ("a.csv", "n\n1\nx\n", r"a\.csv, row 3: invalid literal"),
        ("a.jsonl", "", "holds no usable row"),
        ("a.txt", "", r"must end in one of \.jsonl"),
    ],
)
def test_a_bad_file_is_an_error_that_names_file_line_and_remedy(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_file(tmp_path / name, Parser(parse, ("n",)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"n": 1}\n{"n": 2, "who": "Ren\xe9"}\n', "line 2: not UTF-8"),
        ("a.csv", b"n,who\n1,a\n2,Ren\xe9\n", "a.csv cannot be read as CSV .*utf-8"),
        ("a.csv", b"n\n1\n2,more,Ren\xe9\n", "a.csv cannot be read as CSV .*utf-8"),
    ],
)
def test_bytes_that_are_not_utf8_are_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_file(tmp_path / name, Parser(parse))


def test_lines_end_at_line_feeds_alone(tmp_path):
    text = "\u2028\u2029\x85"
    lines = [f'{{"n": 1, "text": "{text}"}}\r\n', '{"n": 2,\r"text": "b"}\n']
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "".join(lines)).encode())
    assert load_file(tmp_path / "a.jsonl", Parser(dict)) == [{"n": 1, "text": text}, {"n": 2, "text": "b"}]


def test_bad_rows_are_skipped_and_counted_if_asked(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"m": 1}\n{"n": "x"}\n')
    assert load_file(tmp_path / "a.jsonl", Parser(parse, ("n",), "skip")) == [{"n": 1}]
    assert "Skipped 2 bad rows" in caplog.text
    with pytest.raises(ValueError, match="`on_bad_row` must be one of error, skip, got 'eror'"):
        Parser(parse, on_bad_row="eror")


def test_a_wrong_path_and_a_folder_without_splits_are_errors(tmp_path):
    with pytest.raises(ValueError, match="No data file"):
        load_file(tmp_path / "none.jsonl", Parser(parse))
    with pytest.raises(ValueError, match="No file or folder"):
        local_loader(tmp_path / "none", Parser(parse))
    with pytest.raises(ValueError, match="holds none of train, validation, test"):
        local_loader(tmp_path, Parser(parse))


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_remedy(monkeypatch):
    import datasets

    def fail(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"Could not load train of a/b .* set `path`"):
        hub_loader({"train": ("a/b", None, "train")}, Parser(parse), revision=None)("train")


def test_unknown_sizes_are_an_error():
    with pytest.raises(ValueError, match="`sizes` must map"):
        HeldOutSplits(lambda split: None, key=str, sizes={"dev": 1})


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes("\ufeffname\nx\n".encode())
    assert load_file(file, Parser(dict, ("name",))) == [{"name": "x"}]


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_parquet_file_that_is_none_is_named_with_a_remedy(tmp_path, content):
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet .*; write it again"):
        load_file(file, Parser(dict))


def test_a_csv_field_that_is_too_long_is_an_error(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("name\n" + "x" * 200_000 + "\ny\n")
    with pytest.raises(ValueError, match=r"a\.csv cannot be read as CSV"):
        load_file(file, Parser(dict))
