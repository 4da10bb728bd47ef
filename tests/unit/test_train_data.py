"""The training text: sources, split, tokens and batches."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_optim.data.batches import BatchShape, PackedBatches, StreamBatches
from ds_optim.data.load import load_data
from ds_optim.data.split import is_validation, kept, split_documents, training_index
from ds_optim.data.text_source import left_out, load_documents, stream_documents
from ds_optim.data.tokens import (
    BpeTokenizer,
    ByteTokenizer,
    Ids,
    cached_bpe,
    encode_documents,
    train_bpe,
    unigram_entropy,
)
from ds_optim.errors import UserError
from ds_optim.job.settings import make_settings
from ds_optim.train.evaluate import evaluation_windows

SENTENCE = "the quick brown fox jumps over the lazy dog. "


def shape(*, rank: int = 0, world_size: int = 1, micro_batch: int = 2, accumulation: int = 1) -> BatchShape:
    return BatchShape(seq_len=4, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world_size=world_size)


def step_of_all_ranks(ids: Ids, step: int, *, world_size: int, micro_batch: int, accumulation: int) -> torch.Tensor:
    """The windows of a step over all ranks, in the order of the global batch; (global batch, seq_len + 1)."""
    ranks = [
        PackedBatches(
            ids, shape(rank=rank, world_size=world_size, micro_batch=micro_batch, accumulation=accumulation), 3
        ).step(step)
        for rank in range(world_size)
    ]
    return torch.cat([ranks[rank][turn] for turn in range(accumulation) for rank in range(world_size)])


# ---- sources


def test_shipped_text_is_megabytes_of_separate_works_without_a_licence() -> None:
    documents = load_documents("shakespeare")
    assert len(documents) == 42
    assert 4_500_000 < sum(map(len, documents)) < 5_500_000
    whole = "".join(documents)
    assert whole.isascii()
    assert "To be, or not to be" in whole
    assert "gutenberg" not in whole.lower()


def test_local_sources_agree(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = ["first document", "second\none", "third"]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(rows)
    Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "rows.parquet"))
    for source in ("*.txt", "rows.jsonl", "rows.jsonl.gz", "rows.parquet"):
        assert load_documents(str(tmp_path / source)) == texts, source


def test_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert load_documents(str(tmp_path)) == ["one", "two"]


def zstd(data: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


def rows_of(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl.zst", zstd(rows_of("one").encode()) + zstd(rows_of("two, three").encode())),
        ("x.json.bz2", bz2.compress(rows_of("one", "two, three").encode())),
        ("x.JSONL", rows_of("one", "two, three").encode()),
        ("x.Json.XZ", lzma.compress(rows_of("one", "two, three").encode())),
        ("x.ndjson", b"\xef\xbb\xbf\n" + rows_of("one", "two, three").encode()),
        ("array.json", json.dumps([{"text": "one"}, {"text": "two, three"}]).encode()),
        ("lines.json", json.dumps([{"text": "one"}, {"text": "two, three"}], indent=1).encode()),
        ("x.csv", b'id,text\r\n1,one\r\n2,"two, three"\r\n'),
        ("x.tsv.gz", gzip.compress(b"text\tid\none\t1\ntwo, three\t2\n")),
    ],
    # (not the bytes: a .gz holds the second in which it was made, and two processes that collect
    # these tests must agree on their names)
    ids=lambda value: value if isinstance(value, str) else "rows",
)
def test_every_kind_of_rows_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert load_documents(str(tmp_path / name)) == ["one", "two, three"]
    assert load_documents(str(tmp_path)) == ["one", "two, three"]
    assert left_out(str(tmp_path)) is None


def test_a_csv_keeps_numbers_and_long_documents(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "x.csv").write_text(f"text\n0012\n{long}\n")
    assert load_documents(str(tmp_path)) == ["0012", long]


def test_one_object_over_several_lines_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"text": "one"}, indent=2))
    assert load_documents(str(tmp_path)) == ["one"]


def test_what_is_left_out_of_a_folder_is_named(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["from arrow"]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.html").touch()
    (tmp_path / "b.txt").symlink_to("nowhere")
    (tmp_path / "c.TXT").write_text("from c")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.txt").write_text("hidden")
    (tmp_path / "._c.txt").write_text("hidden too")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "round").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    (tmp_path.parent / f"{tmp_path.name}-elsewhere").mkdir()
    (tmp_path / "linked" / "f.md").write_text("from a link")
    assert load_documents(str(tmp_path)) == ["from c", "from a link", "from arrow"]
    line = left_out(str(tmp_path))
    assert line is not None
    assert line.endswith(
        "6 of 9 files are left out (hidden, metadata, or of another kind):"
        " ._c.txt, .cache, a.html, b.txt, saved/dataset_info.json, saved/state.json"
    )
    data = load_data(make_settings(data=str(tmp_path), seq_len=2), shape())
    assert line in data.notes
    for index in range(20):
        (tmp_path / f"g{index:02d}.log").touch()
    assert str(left_out(str(tmp_path))).endswith(" and 14 more")


def test_what_datasets_leaves_out_is_named(tmp_path: Path) -> None:
    """Of the files of a local data set it reads those of one kind, and says nothing of the others."""
    (tmp_path / "a.jsonl").write_text(rows_of("one"))
    (tmp_path / "b.jsonl").write_text(rows_of("two"))
    (tmp_path / "c.csv").write_text("text\nthree\n")
    (tmp_path / "d.JSONL").write_text(rows_of("four"))
    assert list(stream_documents(f"hub:{tmp_path}")) == ["one", "two"]
    assert "2 of 4 files are left out" in str(left_out(f"hub:{tmp_path}"))
    assert left_out("hub:owner/name") is None
    assert left_out("shakespeare") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("cut.jsonl", b'{"text": "a"}\n{"text":', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', 'line 1 has no string field "text"'),
        ("fake.xz", b"not xz", "cannot read"),
        ("fake.parquet", b"not parquet", "as parquet"),
        ("fake.arrow", b"not arrow", "as arrow"),
        ("fake.jsonl.zst", b"not zst", "cannot read"),
        ("broken.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3abcdefgh", "cannot read"),
        ("cut.bz2", b"BZh91AY", "cannot read"),
        ("array.json", b'[{"text": "a"},\n {"text":}]', "line 2 is not JSON"),
        ("strings.json", b'["a", "b"]', 'row 1 has no string field "text"'),
        ("other.csv", b"body\na\n", 'line 2 has no string field "text"'),
        ("quote.csv", b'text\na\n"b\n', "the row after line 2 is not CSV"),
    ],
)
def test_unreadable_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_documents(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_without_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_documents(str(tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match="no file of"):
        load_documents(str(tmp_path))


def test_hub_source_streams_a_local_data_set_from_any_row(tmp_path: Path) -> None:
    texts = [f"document {index}" for index in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(stream_documents(f"hub:{tmp_path}")) == texts
    assert list(stream_documents(f"hub:{tmp_path}", skip=17)) == texts[17:]


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text":', "b.jsonl, line 301 is not JSON"), ('{"body": 1}', "no string field"), ("[1]", "b.jsonl, line 301")],
)
def test_a_stream_that_breaks_off_is_one_line_with_its_place(tmp_path: Path, line: str, message: str) -> None:
    texts = [f"document {index}" for index in range(300)]
    (tmp_path / "a.jsonl").write_text(rows_of(*texts))
    (tmp_path / "b.jsonl").write_text(f"{rows_of(*texts)}{line}\n{rows_of(*texts)}")
    data = load_data(make_settings(data=f"hub:{tmp_path}", seq_len=4, eval_batches=1), shape(micro_batch=10))
    with pytest.raises(UserError, match=message) as caught:  # noqa: PT012  (in which step is not the point)
        for step in range(150):
            data.batches.step(step)
    assert "\n" not in str(caught.value)


def test_a_stream_whose_network_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        def skip(self, count: int) -> Rows:
            return self

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "a"}
            raise ConnectionError("the hub is\ngone")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows())
    with pytest.raises(UserError, match="--data 'hub:a/b' ends after row 8: the hub is gone"):
        list(stream_documents("hub:a/b", skip=7))


def test_hub_name_reaches_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"text": "a"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(stream_documents("hub:HuggingFaceFW/fineweb:sample-10BT")) == ["a"]
    assert calls == [(("HuggingFaceFW/fineweb", "sample-10BT"), {"split": "train", "streaming": True})]


def test_hub_set_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open the data set") as caught:
        next(stream_documents(f"hub:{tmp_path / 'nothing'}"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is not hub:"):
        next(stream_documents("hub:a:b:c:d"))


# ---- split


def test_split_parts_share_no_document_and_lose_none() -> None:
    documents = [f"document {index}" for index in range(200)]
    train, held, note = split_documents(documents)
    assert note is None
    assert sorted(train + held) == sorted(documents)
    assert 5 <= len(held) <= 40


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_documents_leave_something_on_both_sides(count: int) -> None:
    train, held, _ = split_documents([str(index) for index in range(count)])
    assert train
    assert held


def test_one_document_is_cut_and_says_so() -> None:
    train, held, note = split_documents(["x" * 900 + "y" * 100])
    assert (train, held) == (["x" * 900], ["y" * 100])
    assert note is not None
    assert "10%" in note


def test_stream_split_is_a_partition_and_can_be_entered_anywhere() -> None:
    documents = [str(index) for index in range(100)]
    train = list(kept(iter(documents), 0, validation=False))
    held = list(kept(iter(documents), 0, validation=True))
    assert sorted(train + held) == sorted(documents)
    assert held[0] == "0"
    for count in (0, 1, 40):
        raw = training_index(count)
        assert not is_validation(raw)
        assert list(kept(iter(documents[raw:]), raw, validation=False)) == train[count:]


# ---- tokens


def test_bytes_are_utf8_and_documents_end() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert encode_documents(tokenizer, ["ab", "", "c"]).tolist() == [97, 98, 256, 256, 99, 256]


def test_bpe_is_deterministic_shorter_than_bytes_and_cached_by_its_text(tmp_path: Path) -> None:
    documents = [SENTENCE * 20, "über " * 50]
    serialized = cached_bpe(documents, 300, tmp_path)
    assert serialized == train_bpe(documents, 300)
    tokenizer = BpeTokenizer(serialized)
    assert tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(SENTENCE)) < len(SENTENCE) / 2
    # bytes that the training text never had still have tokens
    assert len(tokenizer.encode("中")) == 3
    cached_bpe(["other text " * 10], 300, tmp_path)
    assert len(list(tmp_path.glob("tokenizer-bpe300-*.json"))) == 2
    assert cached_bpe(documents, 300, tmp_path) == serialized


def test_entropy_of_known_frequencies() -> None:
    ids = np.array([0, 0, 1, 7], dtype=np.int32)
    assert unigram_entropy(ids) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


# ---- batches


def test_an_epoch_has_every_target_once() -> None:
    ids = np.arange(1, 42, dtype=np.int32)
    batches = PackedBatches(ids, shape(), seed=0)
    seen = torch.cat([batches.step(step)[0] for step in range(5)])
    assert sorted(seen[:, 1:].flatten().tolist()) == list(range(2, 42))
    assert torch.equal(seen[:, :-1] + 1, seen[:, 1:])


def test_epochs_and_seeds_differ_and_a_step_needs_no_other() -> None:
    ids = np.arange(401, dtype=np.int32)
    batches = PackedBatches(ids, shape(), seed=0)
    first = [batches.step(step)[0] for step in range(100)]
    assert not torch.equal(first[0], first[50])
    assert not torch.equal(first[0], PackedBatches(ids, shape(), seed=1).step(0)[0])
    assert torch.equal(PackedBatches(ids, shape(), seed=0).step(77)[0], first[77])


@pytest.mark.parametrize("step", [0, 3, 40])
def test_global_batch_does_not_know_the_number_of_ranks(step: int) -> None:
    ids = np.arange(1000, dtype=np.int32)
    one = step_of_all_ranks(ids, step, world_size=1, micro_batch=12, accumulation=1)
    for world_size, micro_batch, accumulation in ((2, 6, 1), (2, 3, 2), (3, 2, 2), (4, 3, 1)):
        many = step_of_all_ranks(ids, step, world_size=world_size, micro_batch=micro_batch, accumulation=accumulation)
        assert torch.equal(many, one)


def make_stream(rows: list[Ids], calls: list[int]) -> StreamBatches:
    def open_stream(first: int) -> Iterator[Ids]:
        calls.append(first)
        return iter(rows[first:])

    return StreamBatches(open_stream, shape())


def test_stream_goes_on_from_a_position_and_starts_over_at_its_end() -> None:
    rows = [np.arange(100 * index, 100 * index + size, dtype=np.int32) for index, size in enumerate((11, 3, 30, 7))]
    text = np.concatenate(rows * 4)
    whole = make_stream(rows, [])
    positions, steps = [], []
    for step in range(12):
        positions.append(whole.position())
        steps.append(whole.step(step)[0])
        expected = text[step * 8 : step * 8 + 9]
        assert steps[step].flatten().tolist() == [*expected[:5], *expected[4:]]
    for step, position in enumerate(positions):
        calls: list[int] = []
        resumed = make_stream(rows, calls)
        resumed.restore(position)
        for later in range(step, 12):
            assert torch.equal(resumed.step(later)[0], steps[later]), (step, later)
        assert calls[0] == position["document"]


def test_stream_without_text_is_an_error() -> None:
    with pytest.raises(UserError, match="no training text"):
        make_stream([], []).step(0)


def test_evaluation_windows_are_spread_and_never_repeat() -> None:
    ids = np.zeros(401, dtype=np.int32)
    assert evaluation_windows(ids, 4, 1000).tolist() == list(range(100))
    few = evaluation_windows(ids, 4, 7)
    assert len(set(few.tolist())) == 7
    assert few.min() == 0
    assert few.max() >= 80


# ---- together, on one rank


def test_text_shorter_than_a_sequence_says_what_to_change(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(SENTENCE * 3)
    with pytest.raises(UserError, match=r"validation part .* fewer than one sequence .* smaller --seq-len"):
        load_data(make_settings(data=str(path), seq_len=100), shape())
    with pytest.raises(UserError, match="training part"):
        load_data(make_settings(data=str(path), seq_len=1000), shape())


def test_streamed_data_holds_out_documents(tmp_path: Path) -> None:
    texts = [f"<{index:03d}>" for index in range(300)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = load_data(make_settings(data=f"hub:{tmp_path}", seq_len=4, eval_batches=3), shape())
    held = {text for index, text in enumerate(texts) if is_validation(index)}
    found = bytes(byte for byte in data.validation.tolist() if byte != 256).decode()
    assert found[:5] == "<000>"
    assert {found[at : at + 5] for at in range(0, len(found) - 4, 5)} <= held
    first = bytes(byte for byte in data.batches.step(0)[0].flatten().tolist() if byte != 256).decode()
    assert next(text for text in texts if text not in held) in first
    assert data.validation.size <= 3 * 2 * 4 + 1
