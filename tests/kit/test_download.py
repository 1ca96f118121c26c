"""DEAM from Kaggle, by kagglehub's real client: a server on the loopback address stands for Kaggle.

KAGGLE_API_ENVIRONMENT=LOCALHOST makes the client ask http://localhost, which a proxy can be: the
server of these tests, on a port of its own. Nothing else is asked.
"""

import base64
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import kagglehub
import numpy as np
import pytest
from conftest import call

import audit
import extract
from common import DEAMHandler
from kit.cli import UserError
from kit.deam import KAGGLE, download_deam

OWNER, DATASET = KAGGLE.split("/")[:2]


class Answer(BaseHTTPRequestHandler):
    """Kaggle's API redirects to the archive in a store, which takes up where a download ended."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None and length > len(body)

    def do_POST(self):
        kaggle = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kaggle.asked.append((self.path, asked))
        if self.path.endswith("/AttachDatasourceUsingJwtRequest"):
            answer = {"wasSuccessful": True, "result": {"mountSlug": kaggle.mount}}
            self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")
        elif kaggle.status != 200:
            self.reply(kaggle.status, b"{}", Content_Type="application/json")
        else:
            self.reply(302, Location="http://localhost/store/archive.zip?signature=1")

    def do_GET(self):
        kaggle = self.server
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        start = int(start[1]) if kaggle.ranges else 0
        kaggle.asked.append(("GET", start))
        body = kaggle.archive[start:]
        hashed = base64.b64encode(hashlib.md5(kaggle.whole).digest()).decode()
        headers = {"Accept_Ranges": "bytes"} | (
            {"x_goog_hash": f"crc32c=AAAAAA==,md5={hashed}"} if kaggle.hashed else {})
        if start >= len(kaggle.archive):
            self.reply(416, b"<error>out of range</error>")
        else:
            self.reply(206 if "Range" in self.headers and kaggle.ranges else 200,
                       body[:kaggle.cut], len(body), **headers)


@pytest.fixture(scope="module")
def archive(demo):
    """A small DEAM: the demo's annotations, three of its songs, and 3 MB that do not compress, so
    that more than one of the client's chunks of 1 MiB are written."""
    content, songs = io.BytesIO(), []
    with zipfile.ZipFile(content, "w") as file:
        for path in sorted((demo / "DEAM").rglob("*")):
            if path.suffix == ".csv" or path.suffix == ".wav" and len(songs) < 3:
                songs += [int(path.stem)] if path.suffix == ".wav" else []
                file.write(path, path.relative_to(demo / "DEAM"))
        file.writestr("padding.bin", np.random.default_rng(0).bytes(3 << 20))
    return content.getvalue(), songs


@pytest.fixture
def kaggle(archive, tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.handle_error = lambda *_: None  # of clients that have heard enough
        server.whole = server.archive = archive[0]
        server.asked, server.cut, server.status, server.mount = [], None, 200, None
        server.hashed = server.ranges = True
        server.cache = tmp_path / "cache"
        server.address = f"http://127.0.0.1:{server.server_port}"
        for name in os.environ:
            if name.startswith(("KAGGLE", "COLAB", "TBE_")) or name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        for name, value in (("KAGGLE_API_ENVIRONMENT", "LOCALHOST"), ("HOME", tmp_path / "home"),
                            ("http_proxy", server.address), ("https_proxy", server.address),
                            ("KAGGLE_CONFIG_DIR", tmp_path), ("KAGGLEHUB_CACHE", server.cache)):
            monkeypatch.setenv(name, str(value))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        server.end = server.shutdown
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def offline(kaggle, monkeypatch):
    """Nobody answers."""
    return lambda: [monkeypatch.setenv(name, "http://127.0.0.1:9") for name in
                    ("http_proxy", "https_proxy")]


def starts(kaggle):
    """From which byte on the archive was asked for, each time."""
    return [start for kind, start in kaggle.asked if kind == "GET"]


def refused(says):
    with pytest.raises(UserError, match=says) as error:
        DEAMHandler("kaggle")
    assert "\n" not in str(error.value)


def test_the_first_command(kaggle, archive, demo, splits, tmp_path, offline, capsys, compared):
    """Interrupted twice and resumed; then features as of a folder of one's own; then once more from
    the cache, without a network."""
    songs = archive[1]
    command = ["--weights", demo / "backbone", "--splits", demo / "splits.json", "--songs", *songs,
               "--precision", "float32", "--device", "cpu"]
    for kaggle.cut in (2_500_000, 1_200_000):
        refused("cannot download DEAM .* rerun, which resumes")
    kaggle.cut = None
    assert call(extract, *command, "--features", tmp_path / "f") == 0
    first, second, third = starts(kaggle)[0], *sorted(set(starts(kaggle)) - {0})
    assert first == 0 and 0 < second < third < len(kaggle.whole)
    _, asked = kaggle.asked[0]
    assert (asked["ownerSlug"], asked["datasetSlug"]) == (OWNER, DATASET)
    assert str(asked["datasetVersionNumber"]) == "1"
    assert not any("GetDataset" in path for path, _ in kaggle.asked)  # the latest is not asked for
    assert call(extract, *command, "--deam", demo / "DEAM", "--features", tmp_path / "own") == 0
    digests = re.findall("root digest ([0-9a-f]{64})", capsys.readouterr().out)
    assert len(digests) == 2 and len(set(digests)) == 1
    offline()
    del kaggle.asked[:]
    assert call(extract, *command, "--features", tmp_path / "f") == 0 and not kaggle.asked
    assert f"{len(songs)} songs, 0 to do" in capsys.readouterr().out
    assert [path.name for path in kaggle.cache.rglob("*.archive")] == []
    compared(len(songs), "songs")


def test_offline_without_a_cache(offline, kaggle):
    offline()
    refused("cannot download DEAM .*--deam")
    assert not kaggle.asked


@pytest.mark.parametrize("status", [403, 404, 503])
def test_kaggle_refuses(kaggle, compared, status):
    kaggle.status = status
    refused(f"cannot download DEAM from Kaggle .*{status}")
    kaggle.status = 200
    assert DEAMHandler("kaggle").annotations
    compared(1, "recoveries")


def flipped(archive):
    """One bit of a compressed or stored file is another."""
    place = archive.index(b"padding.bin") + 1_000_000
    return archive[:place] + bytes([archive[place] ^ 1]) + archive[place + 1:]


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("damage", [
    flipped, lambda archive: archive[:2_000_000], lambda archive: b"<html>log in</html>",
    lambda archive: b"", lambda archive: archive[2_000_000:], lambda archive: archive[:-30]])
def test_a_damaged_archive_is_not_kept(kaggle, compared, damage, hashed):
    """With the store's digest and without; the next run gets the whole one."""
    kaggle.archive, kaggle.hashed = damage(kaggle.whole), hashed
    refused("damaged|cannot download DEAM")
    kaggle.archive = kaggle.whole
    assert DEAMHandler("kaggle").annotations
    compared(1, "recoveries")


@pytest.mark.parametrize("hashed", [True, False])
def test_a_partial_file_of_something_else_is_not_kept(kaggle, compared, hashed):
    """What lies in the cache is longer than the archive, or the store begins from the start."""
    kaggle.hashed, partial = hashed, kaggle.cache / f"datasets/{OWNER}/{DATASET}/1.archive"
    for kaggle.ranges, content in ((True, 2 * kaggle.whole[9:]), (False, kaggle.whole[9:2000])):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        (partial.parent / "1.complete").unlink(missing_ok=True)
        with contextlib.suppress(UserError):  # zipfile finds an archive behind other bytes
            DEAMHandler("kaggle")
            assert not hashed
        found = DEAMHandler("kaggle").root / "padding.bin"
        assert found.read_bytes() in kaggle.whole and found.stat().st_size == 3 << 20
    compared(2, "recoveries")


@pytest.mark.parametrize("full", ["1.archive", "versions/1/padding.bin"])
def test_no_room(kaggle, compared, full):
    """While downloading, and while unpacking; once there is room again, all goes on."""
    place = kaggle.cache / f"datasets/{OWNER}/{DATASET}" / full
    place.parent.mkdir(parents=True)
    place.symlink_to("/dev/full")
    refused(f"cannot write DEAM to {kaggle.cache}.*No space left.*KAGGLEHUB_CACHE")
    place.unlink()
    assert DEAMHandler("kaggle").annotations
    compared(1, "recoveries")


def test_a_cache_that_cannot_be_used(kaggle, monkeypatch):
    kaggle.cache.write_text("")
    refused("cannot download DEAM")
    kaggle.cache.unlink()
    assert DEAMHandler("kaggle").annotations
    shutil.rmtree(folder := DEAMHandler("kaggle").root)
    folder.mkdir()
    refused(f"no longer in kagglehub's folder {folder}: delete 1 there")

    def read_only(_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(kagglehub, "dataset_download", read_only)
    refused(f"cannot write DEAM to {kaggle.cache}.*KAGGLEHUB_CACHE")


def test_an_unversioned_or_later_copy_is_not_taken(kaggle, compared):
    folder = kaggle.cache / f"datasets/{OWNER}/{DATASET}"
    for version in ("", "versions/2"):
        (folder / version).mkdir(parents=True, exist_ok=True)
        (folder / version / "static_annotations_averaged_songs_1_2000.csv").write_text("another")
    (folder / "2.complete").touch()
    assert DEAMHandler("kaggle").root == folder / "versions/1"
    compared(1, "downloads")


def test_two_at_once(kaggle, compared):
    """The second waits, and finds what the first has downloaded."""
    folders = []
    both = [threading.Thread(target=lambda: folders.append(download_deam())) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(20)
    assert folders == 2 * [kaggle.cache / f"datasets/{OWNER}/{DATASET}/versions/1"]
    assert starts(kaggle) == [0]
    compared(2, "threads")


def test_where_kaggles_notebooks_mount_it(kaggle, archive, tmp_path, monkeypatch, offline, capsys,
                                          compared):
    """Nothing is downloaded, and nothing is written there."""
    mount = tmp_path / "input/deam-mediaeval"
    zipfile.ZipFile(io.BytesIO(archive[0])).extractall(mount)
    for path in (mount, *mount.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in (mount, *mount.rglob("*"))}
    kaggle.mount = mount.name
    for name, value in (("KAGGLE_KERNEL_RUN_TYPE", "Interactive"), ("KAGGLE_DATA_PROXY_TOKEN", "a"),
                        ("KAGGLE_DATA_PROXY_URL", "http://localhost"),
                        ("KAGGLE_USER_SECRETS_TOKEN", "b"),
                        ("KAGGLE_CACHE_MOUNT_FOLDER", str(mount.parent))):
        monkeypatch.setenv(name, value)
    assert DEAMHandler("kaggle").root == mount
    (path, asked), = kaggle.asked
    assert path.endswith("/AttachDatasourceUsingJwtRequest")
    assert asked["datasetRef"] == {"OwnerSlug": OWNER, "DatasetSlug": DATASET, "VersionNumber": "1"}
    assert call(audit) == 0 and "99.9% interval" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (mount, *mount.rglob("*"))}
    offline()
    refused("cannot download DEAM .*--deam")
    compared(len(before), "files that stay as they are")
