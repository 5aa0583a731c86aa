"""The node's copies of remote files: fetched once by all processes of a node, checked once, made room for, and never half."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillation import cache
from distillation.errors import ConfigError, StorageError
from distillation.storage import Storage
from distillation.store import open_artifact
from tests.distillation.served import proxied, s3_server
from tests.distillation.test_store import write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server():
    with s3_server() as address, proxied(address) as proxy:
        yield proxy


@pytest.fixture
def s3(server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    server.delay, server.status, server.failures = 0.0, None, 0
    server.log.clear()
    return Storage(f"s3://bucket/{tmp_path.name}?scheme=http&endpoint_override={server.address}")


def copies(tmp_path):
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent.name != ".locks"]


def gets(server, name):
    return [path for method, path, status, _ in server.log if method == "GET" and path.endswith(name) and status == 206]


_FETCH = """
import sys
from distillation.storage import Storage
storage = Storage(sys.argv[1])
sys.stdin.readline()
print(storage.fetch("file", 3_000_000).stat().st_size)
"""


def together(program, count, *arguments):
    """So many processes that begin at the same moment. Returns them."""
    started = [
        subprocess.Popen([sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(count)
    ]
    time.sleep(1.0)
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return started


def test_processes_of_a_node_that_want_one_file_at_once_fetch_it_once(s3, server):
    s3.write("file", bytes(3_000_000))
    server.delay = 0.3
    server.log.clear()
    assert [process.communicate()[0].strip() for process in together(_FETCH, 4, s3.uri)] == ["3000000"] * 4
    assert server.fetched() == 3_000_000


def test_one_that_dies_while_it_fetches_leaves_nothing_and_frees_the_others(s3, server, tmp_path):
    s3.write("file", bytes(3_000_000))
    server.delay = 3.0
    (process,) = together(_FETCH, 1, s3.uri)
    while not list((tmp_path / "cache" / ".locks").glob("*")) or not server_busy(tmp_path):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert [p for p in copies(tmp_path) if p.name == "file"] == []
    server.delay = 0.0
    assert s3.fetch("file", 3_000_000).stat().st_size == 3_000_000


def server_busy(tmp_path):
    """Whether somebody holds the lock of the file."""
    for path in (tmp_path / "cache" / ".locks").glob("*"):
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


_OPEN = """
import sys, time
from distillation import cache
from distillation.storage import Storage
from distillation.store import open_artifact
read = []
plain = cache.checksum
cache.checksum = lambda path: read.append(path) or plain(path)
import distillation.store as store
store.checksum = cache.checksum
open_artifact(Storage(sys.argv[1]), "corpora/1", "corpus")
print(len(read))
"""


def test_a_copy_is_checked_once_a_node_and_not_once_a_process(s3, server, tmp_path):
    write(s3)
    server.log.clear()

    def checked():
        done = subprocess.run([sys.executable, "-c", _OPEN, s3.uri], capture_output=True, text=True, cwd=ROOT, check=True)
        return int(done.stdout)

    assert checked() == 3
    fetched = server.fetched()
    assert checked() == 0
    assert server.fetched() - fetched == len(s3.read("corpora/1/manifest.json")), "the manifest alone is read again"
    (copy,) = [p for p in copies(tmp_path) if p.name == "part-0-train.arrow"]
    content = copy.read_bytes()
    copy.write_bytes(content)
    assert checked() == 1, "the same bytes, but somebody wrote them"
    assert checked() == 0


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "empty"])
def test_a_damaged_copy_is_fetched_again_with_a_warning(s3, server, tmp_path, caplog, damage):
    write(s3)
    open_artifact(s3, "corpora/1", "corpus")
    (copy,) = [p for p in copies(tmp_path) if p.name == "part-1-train.arrow"]
    whole = copy.read_bytes()
    copy.write_bytes({"other bytes": bytes(len(whole)), "shorter": whole[:-1], "empty": b""}[damage])
    server.log.clear()
    caplog.clear()
    open_artifact(s3, "corpora/1", "corpus")
    assert copy.read_bytes() == whole
    assert len(gets(server, "part-1-train.arrow")) == 1
    assert [r.getMessage() for r in caplog.records if r.name == "distillery"] == [f"a damaged copy is fetched again: {copy}"]


def test_parts_are_fetched_several_at_a_time(s3, server):
    """Three parts, each a question for its size and one for its content."""
    write(s3)
    server.delay, started = 0.4, time.perf_counter()
    open_artifact(s3, "corpora/1", "corpus")
    assert time.perf_counter() - started < (2 + 3 * 2) * 0.4 - 0.5, "the manifest, then the parts side by side"


def test_what_is_used_longest_ago_makes_room(s3, server, tmp_path, monkeypatch):
    for name in "abcd":
        s3.write(name, bytes(1000))
    a, b, c = (s3.fetch(name, 1000) for name in "abc")
    for copy, hours in ((a, 2), (b, 3), (c, 0)):
        age_of(copy, hours, monkeypatch)
    left = c.with_name(f"{cache.TEMPORARY}dead")
    left.write_bytes(bytes(500))
    age_of(left, 48, monkeypatch)
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", "3200")
    monkeypatch.setattr(cache, "_ctime", lambda status: 0.0)
    s3.fetch("d", 1000)
    assert sorted(p.name for p in copies(tmp_path)) == ["a", "c", "d"], "what a dead process left, then b; c was used just now"
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", "10")
    s3.fetch("b", 1000)
    assert sorted(p.name for p in copies(tmp_path)) == ["b", "c", "d"], "the limit is passed by what is in use"


def age_of(path, hours, monkeypatch):
    status = path.stat()
    os.utime(path, ns=(time.time_ns() - hours * 3_600_000_000_000, status.st_mtime_ns))


def test_a_limit_that_is_no_number(s3, monkeypatch):
    s3.write("a", b"1")
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", "10GB")
    with pytest.raises(ConfigError, match=r"DST-2091.*DISTILLERY_CACHE_BYTES.*expected bytes but found 10GB"):
        s3.fetch("a", 1)


def test_too_little_room_is_found_before_anything_is_fetched(s3, server, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        monkeypatch.setenv("DISTILLERY_CACHE", str(disk / "cache"))
        s3.write("file", bytes(600_000))
        s3.write("large", bytes(600_000))
        s3.fetch("file", 600_000)
        server.log.clear()
        with pytest.raises(StorageError, match=r"DST-5001.*not enough space.*expected 0.01 GB free but found 0.00 GB.*DISTILLERY_CACHE"):
            s3.fetch("large", 6_000_000)
        assert server.log == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_checksum_of_a_large_source_is_remembered_until_anything_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    file, read, plain = tmp_path / "rows.csv", [], cache.checksum
    monkeypatch.setattr(cache, "checksum", lambda path: read.append(path) or plain(path))
    file.write_bytes(b"one")
    assert cache.remembered_checksum(file) == cache.remembered_checksum(file) == plain(file)
    assert len(read) == 2, "just written: it could change again without showing it"
    time.sleep(2.1)
    assert [cache.remembered_checksum(file) for _ in range(3)] == [plain(file)] * 3
    assert len(read) == 3
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.remembered_checksum(file) == plain(file), "same size, and its time set back"
    (tmp_path / "other").write_bytes(b"six")
    os.replace(tmp_path / "other", file)
    assert cache.remembered_checksum(file) == plain(file)


# --------------------------------------------------------------------------------------------------------------- the server


def test_a_server_that_stumbles_is_asked_again(s3, server):
    s3.write("x", b"1")
    server.failures = 2
    assert s3.read("x") == b"1"
    server.failures = 2
    s3.write("x", b"2")
    assert s3.read("x") == b"2"


@pytest.mark.parametrize(
    ("status", "advice", "seconds"), [(403, "AWS_ACCESS_KEY_ID", 1), (503, "run again.*AWS_MAX_ATTEMPTS", 12), (500, "run again", 12)]
)
def test_a_server_that_refuses_is_one_line_soon(s3, server, status, advice, seconds):
    server.status, started = status, time.perf_counter()
    with pytest.raises(StorageError, match=rf"DST-5004.*cannot be read.*{advice}") as caught:
        s3.read("x")
    with pytest.raises(StorageError, match=rf"DST-5002.*cannot be written.*{advice}"):
        s3.write("x", b"1")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 2 * seconds


def test_a_server_that_never_answers_is_given_up(s3, server, monkeypatch):
    """Without our limits it takes 99 s."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server.delay, started = 30.0, time.perf_counter()
    with pytest.raises(StorageError, match=r"DST-5004.*NETWORK_CONNECTION.*Check the endpoint"):
        Storage(s3.uri).read("x")
    assert time.perf_counter() - started < 10


def test_endpoint_and_region_come_from_the_environment(s3, server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{server.address}")
    s3.write("x", b"1")
    plain = Storage(s3.uri.partition("?")[0])
    assert plain.read("x") == b"1"
    assert plain.arrow.region == "us-east-1"
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert Storage(plain.uri).arrow.region == "eu-central-1"
    assert Storage(f"{plain.uri}?region=eu-west-2").arrow.region == "eu-west-2"
    with pytest.raises(ConfigError, match=r"DST-2003.*colour"):
        Storage(f"{plain.uri}?colour=red")


def test_a_small_file_is_uploaded_in_one_request(s3, server):
    server.log.clear()
    s3.write("x", b"1")
    assert [(method, status) for method, _, status, _ in server.log] == [("PUT", 200)]
