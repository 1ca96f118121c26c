"""The features folder: its manifest, its readers, and the check of its files."""

import contextlib
import functools
import operator
import shutil

import pytest
import torch
from conftest import call

import verify
from kit.cli import UserError
from kit.features import FeatureFolder, FeatureReader, manifest_digest, read_features, read_manifest
from kit.files import read_json, tensor_digest, write_json


def edited(folder, place, *value):
    """A folder's manifest with another value at a place, or nothing there; its digest is that of
    what it holds, where it can be computed."""
    manifest, (*outer, key) = read_json(folder / "manifest.json", ""), place
    inner = functools.reduce(operator.getitem, outer, manifest)
    inner.pop(key)
    inner.update({key: each for each in value})
    if key != "digest":
        with contextlib.suppress(KeyError):
            manifest["digest"] = manifest_digest(manifest)
    return manifest


def test_check_names_every_damage(own, features, ids, capsys, fails, compared):
    """Ten bytes flipped in turn, and files missing, of other types or of other songs."""
    check = "--features", own
    assert call(verify, *check) == 0
    output = capsys.readouterr().out
    assert "features of 60 songs: identical 60" in output
    assert output.splitlines()[-1].startswith("REPRODUCED: ")
    path = own / "songs" / f"{ids[0]}.pt"
    whole, value = path.read_bytes(), torch.load(path, weights_only=True)
    data = whole.index(value.numpy().tobytes()[:64])  # the rest is the zip's own
    flipped = [bytearray(whole) for _ in range(10)]
    for n, each in enumerate(flipped):
        each[data + n * value.numel() * 4 // 10] ^= 1
    contents = [*map(bytes, flipped), b"", b"text", whole[:-100], None,
                (own / "songs" / f"{ids[1]}.pt").read_bytes()]
    for content in contents:
        path.write_bytes(content) if content is not None else path.unlink()
        assert call(verify, *check) == 1
        output = capsys.readouterr().out
        assert str(path) in output and "identical 59, different 1" in output
    for other in (value.bfloat16(), value[0], value[:0], value * torch.nan, [value], {"a": value},
                  value.to_sparse(), value.to("meta")):
        torch.save(other, path)
        assert call(verify, *check) == 1
        assert str(path) in capsys.readouterr().out
    path.write_bytes(whole)
    for change in ((("songs", str(ids[0]), "frames"), 7), (("settings", "store"), "float16")):
        write_json(own / "manifest.json", edited(features, *change))
        assert call(verify, *check) == 1 and str(path) in capsys.readouterr().out
    for name in ("annotations", "top_layers"):
        write_json(own / "manifest.json", edited(features, (name,), "0" * 64))
        assert call(verify, *check) == 1
        assert f"{name}." in capsys.readouterr().out
    shutil.copy(features / "manifest.json", own)
    for name, content in (("splits.json", "{}"), ("top_layers.pt", "text"),
                          ("annotations.csv", None), ("manifest.json", "{}")):
        (own / name).write_text(content) if content else (own / name).unlink()
        assert name in fails(verify, *check)
        shutil.copy(features / name, own)
    assert call(verify, *check) == 0
    compared(len(contents) + 16, "damaged folders")


def test_no_manifest_ends_in_a_traceback(features, tmp_path, compared):
    """Every key removed and retyped, its digest put right: only what may be there is taken."""
    manifest, path = read_json(features / "manifest.json", ""), tmp_path / "m.json"
    song, tried, taken = next(iter(manifest["songs"])), 0, set()
    places = [*((key,) for key in manifest if key != "environment"), ("source", "name"),
              *(("settings", key) for key in manifest["settings"]), ("songs", song),
              *(("songs", song, key) for key in manifest["songs"][song])]
    for place in places:
        for value in ((), (None,), ([],), ({},), ("x",), (-1.5,), (True,)):
            write_json(path, edited(features, place, *value))
            try:
                read_manifest(path)
                taken.add((place[-1], *map(str, value)))
            except UserError as error:
                assert str(path) in str(error)
            tried += 1
    assert taken == {(song,), ("songs", "{}"), ("name", "x"), ("swapped_labels", "None"),
                     ("swapped_labels", "[]"), ("params", "{}"), ("normalize_epsilon", "None"),
                     ("normalize_epsilon", "-1.5")}
    compared(tried, "manifests")


def test_the_manifests_digest_covers_all_that_decides(features, compared):
    """Each setting, each song's entry and the labels; not the environment."""
    manifest = read_json(features / "manifest.json", "")
    song, digests = next(iter(manifest["songs"])), {manifest["digest"]}
    places = [("annotations",), ("top_layers",), ("swapped_labels",), ("songs", song), ("params",),
              ("source", "name"),
              *(("settings", key) for key in manifest["settings"]),
              *(("songs", song, key) for key in manifest["songs"][song])]
    for place in places:
        digests.add(manifest_digest(edited(features, place, "another")))
    assert len(digests) == 1 + len(places)
    assert manifest_digest({**manifest, "environment": {}}) == manifest["digest"]
    compared(len(places), "places")


def test_a_file_is_compared_with_its_digest_whenever_it_is_read(own, ids, compared):
    """Songs that the manifest lacks are refused."""
    manifest = read_manifest(own / "manifest.json")
    reader, first = FeatureReader(own, manifest["songs"], 64), ids[0]
    value = reader.read(first)
    assert tensor_digest(value) == manifest["songs"][str(first)]["features"]
    assert torch.equal(reader.read(first), value)
    torch.save(value + 1, reader.path(first))
    with pytest.raises(UserError, match="is damaged"):
        reader.read(first)
    with pytest.raises(UserError, match="not a tensor \\[T, 32\\]"):
        FeatureReader(own, manifest["songs"], 32).read(ids[1])
    shutil.copy(reader.path(ids[1]), own / "songs/3.pt")
    assert not reader.has(3) and reader.has(ids[1])
    with pytest.raises(UserError, match="the manifest has no song 3"):
        reader.read(3)
    assert torch.equal(FeatureReader(own, None, 64).read(3), reader.read(ids[1]))
    assert torch.equal(read_features(own / "songs/3.pt"), reader.read(ids[1]))
    compared(5, "reads")


def test_what_is_not_finite_is_a_failure_and_not_stored(features, tmp_path, capsys, compared):
    """NaN, infinity, and what float16 cannot hold."""
    manifest = {**read_json(features / "manifest.json", ""), "songs": {}}
    for n, (store, value) in enumerate((("float32", torch.nan), ("float32", torch.inf),
                                        ("float16", 70_000.0))):
        manifest["settings"] = {**manifest["settings"], "store": store}
        folder, states = FeatureFolder(tmp_path / str(n), [2, 3], manifest), torch.ones(4, 64)
        folder.write_song(2, "0" * 64, states.clone())
        states[3, 63] = value
        folder.write_song(3, "0" * 64, states)
        assert [path.name for path in folder.root.glob("songs/*.pt")] == ["2.pt"]
        assert folder.entry(2)["frames"] == 4 and not folder.finish()
        assert "failed: song 3: NaN or infinity" in capsys.readouterr().out
        assert list(read_manifest(folder.root / "manifest.json")["songs"]) == ["2"]
        assert folder.entry(3) == {}  # to be tried again
    compared(3, "folders")
