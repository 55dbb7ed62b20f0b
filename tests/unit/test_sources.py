import os
import shutil
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from qwlit.core.errors import DataError
from qwlit.data.config import DataConfig, DataPart, parts_of
from qwlit.data.hub import HubData, SavedData, read_data_set
from qwlit.data.sources import File, find_sources
from qwlit.data.tokenizer import TextTokenizer
from tests.real_tokenizer import small_tokenizer
from tests.stores import build, write


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}\n")


def found(path: Path | str, below: Path) -> list[str]:
    return [str(file.path.relative_to(below)) for file in find_sources(str(path)) if isinstance(file, File)]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *((f"rows{suffix}", suffix) for suffix in (".jsonl", ".json", ".parquet", ".csv", ".txt")),
        *((f"rows{suffix}.gz", suffix) for suffix in (".jsonl", ".json", ".csv", ".txt")),
        ("ROWS.JSONL", ".jsonl"),
        ("rows.v2.Json.GZ", ".json"),
    ],
)
def test_a_file_is_one_source_and_its_ending_tells_what_it_is(name: str, suffix: str, tmp_path: Path) -> None:
    touch(tmp_path, name)
    (file,) = find_sources(str(tmp_path / name))
    assert isinstance(file, File)
    assert (file.path, file.suffix, file.name) == (tmp_path / name, suffix, name)
    assert file.is_compressed == name.lower().endswith(".gz")
    assert file.num_bytes() == 3


def test_a_file_of_the_package_is_found() -> None:
    (file,) = find_sources("qwlit:demo/val.jsonl")
    assert file.name == "val.jsonl"


def test_a_folder_is_its_data_files_in_sorted_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.jsonl", "a.json", "c.jsonl.gz", "README.md", ".hidden.jsonl", "_half.jsonl", "d.jsonl/e.jsonl")
    assert found(tmp_path, tmp_path) == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert found(f"{tmp_path}/", tmp_path) == ["a.json", "b.jsonl", "c.jsonl.gz"]


def test_a_glob_is_the_files_that_match_in_sorted_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.jsonl", "a.jsonl", "x.txt", "deep/c.jsonl", "deep/er/d.jsonl", "deep/er/d.csv")
    (tmp_path / "e.jsonl").mkdir()
    assert found(tmp_path / "*.jsonl", tmp_path) == ["a.jsonl", "b.jsonl"]
    assert found(tmp_path / "**/*.jsonl", tmp_path) == ["a.jsonl", "b.jsonl", "deep/c.jsonl", "deep/er/d.jsonl"]
    assert found(tmp_path / "deep/er/[a-d].csv", tmp_path) == ["deep/er/d.csv"]


def test_a_glob_in_the_working_folder_is_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jsonl", "deep/b.jsonl")
    monkeypatch.chdir(tmp_path)
    assert [str(file) for file in find_sources("**/*.jsonl")] == ["a.jsonl", "deep/b.jsonl"]


def test_a_glob_meets_a_file_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    touch(tmp_path, "deep/a.jsonl")
    (tmp_path / "deep/up").symlink_to(tmp_path)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "deep/a.jsonl")
    assert len(find_sources(str(tmp_path / "**/*.jsonl"))) == 1


def test_an_empty_path_is_not_the_working_folder() -> None:
    with pytest.raises(DataError, match="a path is empty"):
        find_sources("")


def test_links_that_lead_in_circles_do_not_multiply_files_or_hang(tmp_path: Path) -> None:
    touch(tmp_path / "d", "a.jsonl")
    for name in ("up", "again"):
        (tmp_path / "d" / name).symlink_to(tmp_path / "d")
    assert [str(source) for source in find_sources(str(tmp_path / "**" / "*.jsonl"))] == [f"{tmp_path}/d/a.jsonl"]
    with pytest.raises(DataError, match="is not a valid glob pattern"):
        find_sources(str(tmp_path / "a**b" / "*.jsonl"))


def test_a_link_to_nowhere_in_a_folder_is_not_left_out_silently(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is a broken link"):
        find_sources(str(tmp_path))


def test_a_name_that_looks_like_a_glob_is_first_of_all_a_name(tmp_path: Path) -> None:
    touch(tmp_path, "rows[1].jsonl", "rows1.jsonl", "all[x]/a.jsonl")
    assert found(tmp_path / "rows[1].jsonl", tmp_path) == ["rows[1].jsonl"]
    assert found(tmp_path / "all[x]", tmp_path) == ["all[x]/a.jsonl"]


def test_files_of_several_kinds_are_asked_about(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "README.txt", "b.json")
    for path in (tmp_path, tmp_path / "*"):
        with pytest.raises(
            DataError, match=r"has \.json and \.jsonl and \.txt files; name one kind, e\.g\. '.*/\*\.json'"
        ):
            find_sources(str(path))
    touch(tmp_path / "tables", "a.csv", "b.parquet")
    assert len(find_sources(str(tmp_path / "tables"))) == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (r"C:\data\chat.jsonl", "Is it a Windows path"),
        ("math: a.jsonl", r"For validation sets with names write 'data\.val_path=\{NAME: PATH, NAME: PATH\}'"),
        ("math:a.jsonl chat: b.jsonl", "For validation sets with names"),
    ],
)
def test_a_path_that_seems_to_mean_something_else_is_answered_with_it(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_sources(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("trian.jsonl", r"trian.jsonl' does not exist\. Did you mean 'train.jsonl'\?"),
        ("no/such/folder", r"no/such/folder' does not exist\.$"),
        ("rows.xlsx", r"must end in \.jsonl, \.json, \.parquet, \.csv, \.txt \(text ones also \.gz\)"),
        ("rows.parquet.gz", r"must end in \.jsonl"),
        ("rows.gz", r"must end in \.jsonl"),
        ("empty", r"has no \.jsonl, \.json, \.parquet, \.csv, \.txt file$"),
        ("nested", r"has no .* file; for folders in it write '.*nested/\*\*/\*\.jsonl'"),
        ("loop.jsonl", "loop.jsonl'"),
        ("*.csv", r"no file matches '.*\*\.csv'"),
        ("rows.*", r"matches .*rows\.(gz|xlsx|parquet\.gz), which does not end in \.jsonl"),
        ("train.jsonl/x", "cannot be read|does not exist"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("a.jsonl,b.jsonl", r"does not exist\. For several files write \[a,b\]"),
    ],
)
def test_paths_that_lead_nowhere_are_errors_that_name_them(path: str, message: str, tmp_path: Path) -> None:
    touch(tmp_path, "train.jsonl", "rows.xlsx", "rows.parquet.gz", "rows.gz", "nested/deep/a.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(DataError, match=message):
        find_sources(str(tmp_path / path))


def test_a_missing_relative_path_is_told_where_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"'rows.jsonl' does not exist\. .* the current folder, {tmp_path}\.$"):
        find_sources("rows.jsonl")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf:org/name", HubData("org/name", None, "train")),
        ("hf:org/name:test", HubData("org/name", None, "test")),
        ("hf:org/name:train[:1000]", HubData("org/name", None, "train[:1000]")),
        ("hf:org/name/config:train[10%:20%]", HubData("org/name", "config", "train[10%:20%]")),
        ("hf:name", HubData("name", None, "train")),
        ("hf:org/name/config", HubData("org/name", "config", "train")),
        ("hf:org/name/config:test", HubData("org/name", "config", "test")),
        ("hf:/data/rows:val", HubData("/data/rows", None, "val")),
        ("hf:./rows", HubData("./rows", None, "train")),
    ],
)
def test_hf_names_a_data_set_of_the_hub_its_configuration_and_its_split(path: str, expected: HubData) -> None:
    (source,) = find_sources(path)
    assert source == expected
    assert find_sources(str(source)) == [source]


@pytest.mark.parametrize("path", ["hf:", "hf:org/name:", "hf::test"])
def test_a_hub_name_that_cannot_be_read_is_an_error_that_shows_how(path: str) -> None:
    with pytest.raises(DataError, match=r"write hf:ORG/NAME, hf:ORG/NAME:SPLIT or hf:ORG/NAME/CONFIG:SPLIT"):
        find_sources(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library `datasets` and a function that sets how the hub, and then the library, answer."""
    datasets = pytest.importorskip("datasets")

    def answers(of_hub: Exception | None, of_library: Any) -> None:
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: _answer(of_hub))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: _answer(of_library))

    return answers


def _answer(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value() if callable(value) else value


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_remedy(hub: Any) -> None:
    hub(ConnectionError("no route to host\nwith a second line"), OSError("nothing in the cache"))
    with pytest.raises(DataError) as raised:
        HubData("org/name", None, "train").load()
    assert str(raised.value).startswith(
        "hf:org/name:train cannot be loaded (the hub cannot be reached: no route to host); if the hub cannot"
    )
    assert "\n" not in str(raised.value)


def test_data_that_the_library_cannot_load_is_one_line_with_its_reason(hub: Any) -> None:
    hub(None, ValueError("Unknown split 'trian'\nand more"))
    with pytest.raises(DataError, match=r"^hf:org/name:trian cannot be loaded \(Unknown split 'trian'\);[^\n]*$"):
        HubData("org/name", None, "trian").load()


def test_without_the_hub_the_library_is_asked_for_what_its_cache_holds(hub: Any) -> None:
    import datasets.config

    usual = datasets.config.HF_HUB_OFFLINE
    hub(ConnectionError("no route to host"), lambda: [datasets.config.HF_HUB_OFFLINE])
    assert HubData("org/name", None, "train").load() == [True]
    assert usual == datasets.config.HF_HUB_OFFLINE


def test_a_folder_read_by_datasets_has_a_digest_that_follows_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    digests = []
    for content in (b'{"text": "a"}\n{"text": "b"}\n', b'{"text": "c"}\n'):
        write(tmp_path / "rows/train.jsonl", [content])
        (source,) = find_sources(f"hf:{tmp_path}/rows")
        assert isinstance(source, HubData)
        digests += [source.digest(tmp_path), source.digest(tmp_path)]
    assert list(source.load()) == [{"text": "c"}]
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_the_digest_is_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "deep/b.jsonl")
    digests = [File(tmp_path / name).digest(tmp_path / "cache") for name in ("a.jsonl", "deep/b.jsonl")]
    assert digests == [sha256(b"{}\n").hexdigest()] * 2


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as long unchanged, however new it is."""
    monkeypatch.setattr("qwlit.data.files.RACY_SECONDS", -3600.0)


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    path.write_bytes(b"{}\n")
    first = File(path).digest(cache)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        assert File(path).digest(cache) == first
    (known,) = cache.glob("*.digest")
    for damage in (b"", b"[]", b'{"stamp": 1}', b"\xff"):
        known.write_bytes(damage)
        assert File(path).digest(cache) == first


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", [b"[2]\n", b"[1]\n\n"])
def test_a_file_changed_or_replaced_is_read_again_even_where_its_time_is_set_back(
    content: bytes, tmp_path: Path
) -> None:
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    path.write_bytes(b"[1]\n")
    stat = path.stat()
    before = File(path).digest(cache)
    time.sleep(0.02)
    replacement = tmp_path / "new"
    replacement.write_bytes(content)
    os.utime(replacement, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    replacement.replace(path)
    assert File(path).digest(cache) == sha256(content).hexdigest() != before
    time.sleep(0.02)
    path.write_bytes(content[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert File(path).digest(cache) == sha256(content[::-1]).hexdigest()


def test_a_file_changed_within_the_same_second_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # However slow the machine is, these changes count as close to one another.
    monkeypatch.setattr("qwlit.data.files.RACY_SECONDS", 3600.0)
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    for number in range(20):
        path.write_bytes(b"[%02d]\n" % number)
        assert File(path).digest(cache) == sha256(b"[%02d]\n" % number).hexdigest()
    assert not list(cache.glob("*"))


def test_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vanished\.jsonl' cannot be read: No such file"):
        File(tmp_path / "vanished.jsonl").digest(tmp_path / "cache")


def test_a_path_is_one_part_and_a_list_several() -> None:
    assert parts_of(None) == ()
    assert parts_of(DataConfig(path="a.jsonl").path) == (DataPart(path="a.jsonl"),)
    listed = DataConfig(path=["a.jsonl", {"path": "b.csv", "weight": 3}])  # type: ignore[arg-type]
    assert parts_of(listed.path) == (DataPart(path="a.jsonl"), DataPart(path="b.csv", weight=3.0))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "the list is empty"),
        ([3], r"3 is neither a path nor \{path:…,weight:…\}"),
        (["a.jsonl", None], "None is neither a path nor"),
        ([["a.jsonl"]], r"\[a.jsonl\] is neither a path nor"),
        ([{"weight": 2}], r"\{weight:2\} is neither a path nor"),
        ([{"path": 3}], r"\{path:3\} is neither a path nor"),
        ([{"path": "a.jsonl", "weight": 0}], "weight 0 of a.jsonl must be a number above 0"),
        ([{"path": "a.jsonl", "weight": -1}], "must be a number above 0"),
        ([{"path": "a.jsonl", "weight": float("inf")}], "must be a number above 0"),
        ([{"path": "a.jsonl", "weight": float("nan")}], "must be a number above 0"),
        ([{"path": "a.jsonl", "weight": "3"}], "must be a number above 0"),
        ([{"path": "a.jsonl", "wieght": 3}], "'wieght' is not a setting of a part"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error(path: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(path=path)


def test_a_glob_leaves_out_what_is_hidden_as_a_folder_does(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", ".cache/b.jsonl", "sub/._c.jsonl", "sub/d.jsonl", ".hidden/e.jsonl")
    found = [source.name for source in find_sources(str(tmp_path / "**" / "*.jsonl"))]
    assert found == ["a.jsonl", "d.jsonl"]
    assert [source.name for source in find_sources(str(tmp_path / ".hidden" / "*.jsonl"))] == ["e.jsonl"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What `datasets` itself writes: one data set, and one of several splits."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"text": f"{number} 二", "id": number} for number in range(7)])
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    for name, splits in (("all", ("train", "test")), ("others", ("test", "validation"))):
        parts = {split: rows.select([0]) if split == "test" else rows for split in splits}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / name))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "folder", "size"), [("one", "one", 7), ("all", "all/train", 7), ("all/test", "all/test", 1)]
)
def test_a_folder_written_by_save_to_disk_is_its_rows(saved: Path, path: str, folder: str, size: int) -> None:
    from datasets import load_from_disk

    (source,) = find_sources(str(saved / path))
    assert source == SavedData(saved / folder)
    rows = [row.content for row in read_data_set(0, source)]
    assert rows == list(load_from_disk(str(saved / folder))) and len(rows) == size
    assert source.estimated_bytes() > 0
    store = build(saved / path, TextTokenizer(small_tokenizer("qwen3")), cache_root=saved / "cache")
    assert (store.row_counts.accepted, store.remarks) == (size, {"a row key that is not read: 'id'": size})
    assert store.origin(size - 1) == f"{saved / folder}:{size}"


def test_splits_without_train_are_named(saved: Path) -> None:
    with pytest.raises(DataError, match=r"without the split 'train'; name one: .*others/test, .*others/validation$"):
        find_sources(str(saved / "others"))


def test_the_digest_of_a_saved_folder_follows_its_content_and_no_name(saved: Path) -> None:
    from datasets import load_from_disk

    cache = saved / "cache"
    (source,) = find_sources(str(saved / "one"))
    digest = source.digest(cache)
    shutil.copytree(saved / "one", saved / "copy")
    assert find_sources(str(saved / "copy"))[0].digest(cache) == digest
    changed = load_from_disk(str(saved / "one")).map(lambda row: {"text": row["text"].replace("6", "7")})
    changed.save_to_disk(str(saved / "changed"))
    assert find_sources(str(saved / "changed"))[0].digest(cache) != digest
    arrow = max((saved / "one").glob("*.arrow"))
    content = arrow.read_bytes()
    arrow.write_bytes(content.replace("6 二".encode(), "9 二".encode()))
    assert source.digest(cache) != digest


def test_a_saved_folder_whose_formatting_hides_columns_is_read_whole(saved: Path) -> None:
    from datasets import load_from_disk

    load_from_disk(str(saved / "one")).with_format("numpy", columns=["id"]).save_to_disk(str(saved / "formatted"))
    (source,) = find_sources(str(saved / "formatted"))
    assert next(read_data_set(0, source)).content == {"text": "0 二", "id": 0}


@pytest.mark.parametrize("damage", ["missing", "cut", "state"])
def test_a_damaged_saved_folder_is_one_line(saved: Path, damage: str) -> None:
    arrow = max((saved / "one").glob("*.arrow"))
    if damage == "missing":
        arrow.unlink()
    elif damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[:300])
    else:
        (saved / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"one[^\n]*(cannot be|is damaged|is not a complete Arrow file)[^\n]*$"):
        build(saved / "one", TextTokenizer(small_tokenizer("qwen3")), cache_root=saved / "cache")


def test_images_of_a_saved_folder_are_refused_without_being_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["a", "b"], "image": [{"bytes": b"no image", "path": None}, None]}
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "rows"))
    store = build(tmp_path / "rows", TextTokenizer(small_tokenizer("qwen3")), cache_root=tmp_path / "cache")
    ((line, reason),) = [(row["line"], row["reason"]) for row in store.quarantine()]
    assert line == 1 and reason.startswith("has 'image'")
