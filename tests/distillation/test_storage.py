"""Files appear whole or not at all, on a disk and in an object store; what a disk refuses is an error that names the place."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from moto.server import ThreadedMotoServer

from distillation.errors import ConfigError, InputError, SecurityError, StorageError
from distillation.storage import Storage, fetch_tree, filesystem


@pytest.fixture(scope="module")
def s3_server():
    """A server that speaks the S3 protocol, with one bucket. Yields its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    return Storage(f"s3://bucket/{tmp_path.name}?scheme=http&endpoint_override={s3_server}&region=us-east-1")


@pytest.fixture
def local(tmp_path):
    return Storage(str(tmp_path / "storage"))


@pytest.fixture(params=["local", "s3"])
def storage(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield Storage(str(folder))
    subprocess.run(["umount", "-l", str(folder)], check=True)


def cached_files(tmp_path):
    return sorted(p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent.name != ".locks")


# ---------------------------------------------------------------------------------------------------- both kinds of storage


def test_write_read_list_delete(storage):
    assert not storage.exists("a/b.txt")
    assert storage.list("a") == []
    storage.write("a/b.txt", b"one")
    storage.write("a/b.txt", b"two!")
    storage.write("a/a.txt", b"")
    assert storage.exists("a/b.txt")
    assert storage.read("a/b.txt") == b"two!"
    assert storage.list("a") == ["a.txt", "b.txt"]
    assert storage.fetch("a/b.txt").read_bytes() == b"two!"
    storage.delete("a/b.txt")
    storage.delete("a/b.txt")
    assert storage.list("a") == ["a.txt"]
    storage.delete("a")
    assert not storage.exists("a/a.txt")


def test_what_is_missing_is_a_file_not_found_error(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("none")
    with pytest.raises(FileNotFoundError):
        storage.fetch("none")


def test_a_block_that_raises_leaves_nothing(storage, tmp_path):
    with pytest.raises(ZeroDivisionError), storage.writing("a/file") as path:  # noqa: PT012 - the block is what is tried
        path.write_bytes(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), storage.writing_folder("folder", last="manifest.json") as beside:  # noqa: PT012
        (beside / "weights").write_bytes(b"half")
        raise ZeroDivisionError
    assert not storage.exists("a/file")
    assert not storage.exists("folder")
    assert [p for p in tmp_path.rglob("*") if ".tmp-" in p.name] == []


def test_nothing_lies_under_the_name_before_the_block_ends(storage):
    storage.write("file", b"old")
    with storage.writing("file") as path:
        path.write_bytes(b"new")
        assert storage.read("file") == b"old"
        assert storage.list("") == ["file"]
    assert storage.read("file") == b"new"


def test_errors_of_the_block_itself_stay_what_they_are(storage, tmp_path):
    with pytest.raises(FileNotFoundError, match="my_input"), storage.writing("file"):
        (tmp_path / "my_input").read_bytes()
    with pytest.raises(PermissionError, match="mine"), storage.writing_folder("folder", last="x"):
        raise PermissionError(errno.EACCES, "mine", "elsewhere")


def test_a_folder_is_replaced_as_a_whole(storage):
    for version in (b"1", b"2"):
        with storage.writing_folder("model", last="manifest.json") as beside:
            (beside / "manifest.json").write_bytes(version)
            (beside / "tokenizer").mkdir()
            (beside / "tokenizer" / "vocab").write_bytes(version)
            (beside / f"only_in_{version.decode()}").write_bytes(b"")
    assert storage.list("model") == ["manifest.json", "only_in_2", "tokenizer"]
    assert storage.read("model/manifest.json") == b"2"
    assert storage.fetch("model/tokenizer/vocab").read_bytes() == b"2"
    assert storage.list("") == ["model"]


def test_two_that_write_one_folder_at_once_leave_one_whole(storage):
    def write(version: bytes) -> None:
        with storage.writing_folder("model", last="b") as beside:
            (beside / "a").write_bytes(version)
            (beside / "b").write_bytes(version)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, [b"1"] * 12))
    assert (storage.read("model/a"), storage.read("model/b")) == (b"1", b"1")


def test_require_writable_leaves_no_trace(storage):
    storage.require_writable(need_bytes=1000)
    assert storage.list("") == []


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a/..", "a\0b"])
def test_a_path_cannot_leave_the_storage(storage, path):
    for action in (storage.read, storage.exists, storage.list, storage.fetch, storage.delete, lambda p: storage.write(p, b"")):
        with pytest.raises(SecurityError, match="DST-9003"):
            action(path)


def test_pickle_keeps_the_place(storage):
    storage.write("x", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert (copy.uri, copy.root, copy.is_local) == (storage.uri, storage.root, storage.is_local)
    assert copy.read("x") == b"1"


def test_pickle_keeps_a_relative_path_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(Storage("here"))
    monkeypatch.chdir("/")
    assert pickle.loads(pickled).root == str(tmp_path / "here")


# --------------------------------------------------------------------------------------------------------------------- disk


def test_a_full_disk_is_named_and_nothing_half_written_stays(small_disk):
    small_disk.write("before", b"x" * 1000)
    with pytest.raises(StorageError, match=r"DST-5001.*no space left.*/disk/file"):
        small_disk.write("file", b"x" * 2_000_000)
    with pytest.raises(StorageError, match="DST-5001"), small_disk.writing_folder("model", last="m") as beside:
        safetensors.torch.save_file({"weight": torch.zeros(500_000)}, beside / "m")
    assert os.listdir(small_disk.root) == ["before"]
    assert small_disk.read("before") == b"x" * 1000


def test_too_little_space_is_found_before_work_starts(small_disk):
    small_disk.require_writable(need_bytes=500_000)
    with pytest.raises(StorageError, match=r"DST-5001.*expected 0.01 GB free but found 0.00 GB"):
        small_disk.require_writable(need_bytes=10_000_000)


def test_a_disk_that_takes_nothing_at_all(small_disk):
    filler = os.open(f"{small_disk.root}/filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(filler, b"x" * 4096):
            pass
    os.close(filler)
    with pytest.raises(StorageError, match="DST-5001"):
        small_disk.require_writable()
    assert os.listdir(small_disk.root) == ["filler"]


def test_storage_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"DST-5002.*/file/storage/.*Check cluster.storage"):
        Storage(str(tmp_path / "file" / "storage")).require_writable()


def test_a_folder_that_belongs_to_others_cannot_be_written(local):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    os.makedirs(local.root, mode=0o500)
    with pytest.raises(StorageError, match="DST-5002"):
        local.require_writable()


def test_tilde_and_relative_paths_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Storage("~/here").root == Storage("here").root == str(tmp_path / "here")


# ---------------------------------------------------------------------------------------------------------------------- URIs


@pytest.mark.parametrize("uri", ["http://host/x", "https://host/x", "file:///etc", "ftp://host/x", "S3A://b/x", "gopher://x"])
def test_schemes_that_are_not_listed_are_refused(uri):
    with pytest.raises(SecurityError, match=r"DST-9001.*s3://, gs://, abfs://, hdfs://"):
        filesystem(uri)


@pytest.mark.parametrize(
    "uri",
    ["s3://AKIA:sesame@bucket/x", "s3://AKIA@bucket/sesame", "abfs://box:sesame@account.dfs.core.windows.net/x"]
    + [f"s3://bucket/x?{key}=sesame" for key in ("secret_key", "access_key", "password", "session_token", "sig")],
)
def test_a_password_is_refused_and_not_repeated(uri):
    with pytest.raises(SecurityError, match="DST-9002") as caught:
        filesystem(uri)
    assert "sesame" not in str(caught.value)


def test_a_container_of_azure_is_no_password():
    system, root = filesystem("abfs://box@account.dfs.core.windows.net/folder")
    assert (system.type_name, root) == ("abfs", "box/folder")


@pytest.mark.parametrize("uri", ["s3://", "s3://bucket/x?colour=red", "abfs://x"])
def test_what_is_no_place_is_refused(uri):
    with pytest.raises(ConfigError, match=r"DST-2003.*expected scheme://bucket/path"):
        filesystem(uri)


# -------------------------------------------------------------------------------------------------------------- object store


def test_a_remote_file_is_fetched_once_and_again_when_it_changed(s3, tmp_path):
    s3.write("a/part", b"12345")
    copy = s3.fetch("a/part", 5)
    assert copy.read_bytes() == b"12345"
    assert cached_files(tmp_path) == [copy]
    copy.write_bytes(b"abcde")
    assert s3.fetch("a/part", 5).read_bytes() == b"abcde", "same size: the copy is used"
    assert s3.fetch("a/part", 5, again=True).read_bytes() == b"12345"
    copy.write_bytes(b"abc")
    assert s3.fetch("a/part", 5).read_bytes() == b"12345", "other size: it is not"
    s3.write("a/part", b"54321")
    assert s3.fetch("a/part", 5).read_bytes() == b"54321", "written through this node: the old copy is gone"
    s3.delete("a")
    assert cached_files(tmp_path) == []


def test_a_remote_folder_is_brought_up_to_date(s3):
    s3.write("model/config.json", b"1")
    s3.write("model/old.bin", b"1")
    uri = s3.uri.replace("?", "/model?")
    time.sleep(2.2)
    folder = fetch_tree(uri)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"config.json": b"1", "old.bin": b"1"}
    before = (folder / "old.bin").stat().st_ino
    s3.write("model/config.json", b"2")
    assert fetch_tree(uri) == folder
    assert (folder / "config.json").read_bytes() == b"2"
    assert (folder / "old.bin").stat().st_ino == before, "what did not change is not fetched again"
    s3.delete("model/old.bin")
    assert os.listdir(fetch_tree(uri)) == ["config.json"]
    with pytest.raises(InputError, match="DST-3001"):
        fetch_tree(uri.replace("/model", "/nothing"))


def test_fetch_tree_of_a_local_folder_is_the_folder(tmp_path):
    assert fetch_tree(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match=r"DST-3001.*/none"):
        fetch_tree(str(tmp_path / "none"))


_UPLOAD = """
import sys
from distillation.storage import Storage

with Storage(sys.argv[1]).writing_folder("model", last="MANIFEST") as beside:
    for name in ["MANIFEST", *(f"{i:03}.bin" for i in range(300))]:
        (beside / name).write_bytes(b"x")
"""


def test_a_folder_whose_upload_is_killed_has_no_manifest(s3):
    """The last file marks the folder as whole, also where it replaces another."""
    s3.write("model/MANIFEST", b"of the folder that is replaced")
    s3.write("model/old.bin", b"")
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", _UPLOAD, s3.uri], cwd=root) as upload:
        while "005.bin" not in s3.list("model"):
            assert upload.poll() is None
        upload.kill()
    assert upload.returncode == -signal.SIGKILL
    names = s3.list("model")
    assert names == [f"{i:03}.bin" for i in range(len(names))]
    assert 6 <= len(names) < 300


def test_a_bucket_that_does_not_exist(s3):
    with pytest.raises(StorageError, match=r"DST-5002.*NO_SUCH_BUCKET"):
        Storage(s3.uri.replace("bucket", "other-bucket", 1)).require_writable()


def test_a_server_that_is_away(s3, s3_server):
    away = Storage(s3.uri.replace(s3_server, "127.0.0.1:9"))
    with pytest.raises(StorageError, match=r"DST-5004.*cannot be read.*Could not connect"):
        away.read("x")
