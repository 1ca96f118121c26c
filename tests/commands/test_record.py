"""What is published of a run, checked at every depth, then damaged in every file and kind of field:
none may leave REPRODUCED or exit code 0."""

import contextlib
import copy
import itertools
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import FLOAT32, call, few, made_features

from kit import cli, metrics
from kit.deam import STATIC
from kit.files import (json_digest, read_json, read_tensors, sha256, write_file, write_json, write_tensors)
from kit.records import manifest_digest
import eval as eval_script
import extract
import record
import train


@pytest.fixture
def verdict(capsys):
    """verdict(script, *arguments): its exit code and what it says; anything but one of the three
    verdicts or one line of error is an exception."""

    def attempt(script, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.execute(script.run, script.parser().parse_args([str(each) for each in arguments]))
        out, err = capsys.readouterr()
        code, lines = stop.value.code, out.splitlines()
        if code != 2:
            words = {0: "REPRODUCED:", 3: "CLOSE:", 1: "NOT REPRODUCED:"}
            assert lines[-1].startswith(words[code]), out
        else:
            assert err.startswith("error: ") and "REPRODUCED" not in out, (out, err)
        return code, out + err

    return attempt


def make_record(run, folder, features="DEAM_feats"):
    """Make the record of a run inside `folder`, unpack it there; the folder that it holds."""
    with contextlib.chdir(folder):
        assert call(record, run, "--features", features) == 0
        with tarfile.open(f"{run.name}.tar") as tar:
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
            tar.extractall("unpacked", **safe)
    return folder / "unpacked" / run.name


@pytest.fixture(scope="module")
def demo_record(clone, tmp_path_factory):
    """(the record of the demo's run, unpacked; the folder of the demo)."""
    demo, folder = clone[0] / "demo", tmp_path_factory.mktemp("record")
    run = shutil.copytree(demo / "run", folder / "runs/last1")
    assert call(eval_script, run, "--features", demo / "DEAM_feats", "--device", "cpu") == 0
    return make_record(run, folder), demo


@pytest.fixture(scope="module")
def short(splits, tmp_path_factory):
    """(a run on made features in float32, two epochs of two steps, evaluated; the features)."""
    folder = tmp_path_factory.mktemp("short")
    features, run = made_features(folder / "DEAM_feats", few(splits)), folder / "runs/frozen"
    assert call(train, "--features", features, "--run", run, "--finetune", "frozen", "--epochs",
                "2", "--batch-size", "20", *FLOAT32) == 0
    assert call(eval_script, run, "--features", features, "--device", "cpu") == 0
    return run, features


@pytest.fixture
def damaged(short, tmp_path):
    """(a record of the short run, to be damaged; {depth: the command line that checks it})."""
    run = make_record(short[0], tmp_path, short[1])
    shutil.copy(short[1] / "annotations.csv", tmp_path / STATIC)  # all of DEAM that this needs
    base, file = ("--features", short[1], "--device", "cpu"), run / "eval-test/metrics.json"
    return run, {"seconds": (eval_script, "--verify", file, "--deam", tmp_path),
                 "minutes": (train, "--verify", run, *base),
                 "hours": (eval_script, run, "--verify", file, *base)}


@pytest.fixture
def computed_once(monkeypatch):
    """What a verdict compares with stays the same while one file is damaged over and over: the
    intervals of the same numbers, the model of the same bytes, a run's evaluation."""

    def once(owner, name, key):
        function, kept = getattr(owner, name), {}

        def cached(*args, **settings):
            place = key(*args)
            if place not in kept:
                kept[place] = function(*args, **settings)
            return kept[place]

        monkeypatch.setattr(owner, name, cached)

    once(metrics, "bootstrap", lambda _, *arrays: b"".join(each.tobytes() for each in arrays))
    once(eval_script, "evaluate", lambda args, folder, *_: folder)
    once(eval_script, "read_model", lambda file: file.read_bytes())


# --------------------------------------------------------------------------------------- the record


def files_of(run):
    """What a record has to hold."""
    return {str(path.relative_to(run)) for path in run.rglob("*")
            if path.is_file() and path.name != "last.pt" and not path.name.startswith(".")}


def test_a_record_is_complete_and_the_same_each_time(short, tmp_path, capsys, compared):
    """No features, no training state, no names, no times; the printed commands name its files."""
    run, features = short
    unpacked = make_record(run, tmp_path, features)
    printed, first = capsys.readouterr().out, (tmp_path / "frozen.tar").read_bytes()
    for path in run.rglob("*"):
        os.utime(path, (10**9, 10**9))
    make_record(run, tmp_path)
    assert (tmp_path / "frozen.tar").read_bytes() == first
    with tarfile.open(tmp_path / "frozen.tar") as tar:
        entries = tar.getmembers()
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.mode)
            for entry in entries} == {(0, 0, 0, "", "", 0o644)}
    files = files_of(run)
    assert {entry.name.removeprefix("frozen/") for entry in entries} == files
    assert all((unpacked / name).read_bytes() == (run / name).read_bytes() for name in files)
    assert sha256(first) in printed
    for command in ("eval.py --verify frozen/eval-test/metrics.json --deam PATH",
                    "extract.py --verify frozen/manifest.json --deam PATH --sample 5",
                    f"train.py --verify frozen --steps 2 --features {features}"):
        assert f"python {command}" in printed
    compared(len(entries), "files")


def test_no_record_of_what_is_not_complete(short, tmp_path, fails, monkeypatch, compared):
    monkeypatch.chdir(tmp_path)
    run, count = shutil.copytree(short[0], tmp_path / "run"), 0
    for name in files_of(run):
        (run / name).rename(tmp_path / "aside")
        assert "complete" in fails(record, run)
        (tmp_path / "aside").rename(run / name)
        count += 1
    metrics = read_json(run / "eval-test/metrics.json", "")
    metrics.pop("digest")
    other = {**metrics, "model": "0" * 64}
    write_json(run / "eval-test/metrics.json", {**other, "digest": json_digest(other)})
    assert "is of another model" in fails(record, run)
    shutil.rmtree(run / "eval-test")
    assert f"run eval.py {run} first" in fails(record, run)
    assert not list(tmp_path.glob("*.tar"))
    compared(count + 2, "refusals")


def test_the_demos_record_at_every_depth(demo_record, verdict, monkeypatch, compared):
    """In the file's own folder nothing is written, nor need it be possible to."""
    run, demo = demo_record
    file, features = run / "eval-test/metrics.json", ("--features", demo / "DEAM_feats")
    before = contents(run)

    def refuse(*_, **__):
        raise PermissionError("a verdict writes nothing")

    for owner, name in ((os, "replace"), (os, "mkdir"), (Path, "mkdir"), (Path, "write_bytes")):
        monkeypatch.setattr(owner, name, refuse)
    for path in (run, run / "eval-test"):
        path.chmod(0o555)
    says = [
        ("follow from its predictions", eval_script, "--verify", file, "--deam", demo / "DEAM"),
        ("of 2 of 60 songs, exact", extract, "--verify", run / "manifest.json", "--deam",
         demo / "DEAM", "--weights", demo / "backbone", "--songs", *songs_of(run)[:2]),
        ("2 of 150 steps", train, "--verify", run, "--steps", "2", *features),
        ("features, model, predictions", eval_script, run, "--verify", file, *features)]
    for words, *command in says:
        code, output = verdict(*command)
        assert code == 0 and words in output.splitlines()[-1] and " 0 different" in output, output
    for path in (run, run / "eval-test"):
        path.chmod(0o755)
    assert before == contents(run)
    compared(len(says), "depths")


def contents(run):
    return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
            for path in run.rglob("*")}


def songs_of(run):
    return list(read_json(run / "manifest.json", "")["songs"])


# ------------------------------------------------------------------------------------------ damage

KINDS = ("changed", math.nan, None, "valence", {}, "removed")  # the others: what stands there then
HARMLESS = ("run", "environment")  # free text, beside the numbers: what it says decides nothing
BLIND = {  # what follows from predictions and labels is not all: these need the run's features
    ("ridge_penalty",): ("changed", None), ("swapped_labels",): (), ("labels",): ()}


def places(content):
    """One place of every kind of field in a metrics.json: paths of keys."""
    song, metric = list(content["predictions"])[-1], ("valence", "r2")
    yield from ((key,) for key in content if key not in ("digest", *HARMLESS))
    yield from (("predictions", song, 0), ("ridge_predictions", song, 1), ("predictions", song))
    for key in content["numbers"]:
        yield "numbers", key
    for key in ("label_mean", "label_std"):
        yield "numbers", key, 0
    yield "numbers", "confusion", 1, 2
    yield "numbers", "ceiling_r2", "arousal"
    yield from (("numbers", "metrics", *metric), ("numbers", "intervals", *metric),
                ("numbers", "intervals", *metric, 1),
                ("numbers", "metrics", "quadrant", "accuracy"),
                ("numbers", "metrics", "quadrant", "f1", "LV/HA"),
                ("numbers", "metrics", "valence_arousal_correlation", "predicted"),
                ("numbers", "baselines", "ridge", *metric),
                ("numbers", "baselines", "training mean", *metric))


def damages(content, places):
    """Yield (place, kind, a copy with one thing done to the field there), every kind at every
    place where it changes anything."""
    for place, kind in itertools.product(places, KINDS):
        inner = copied = copy.deepcopy(content)
        for key in place[:-1]:
            inner = inner[key]
        key, value = place[-1], inner[place[-1]]
        if kind == "removed":
            del inner[key]
        else:
            inner[key] = changed(value) if kind == "changed" else copy.copy(kind)
        if kind == "removed" or inner[key] != value:
            yield place, kind, copied


def changed(value):
    """Another value of the same form."""
    if isinstance(value, dict):
        key = list(value)[-1]
        return {**value, key: changed(value[key])}
    if isinstance(value, list):
        return [*value[:-1], changed(value[-1])] if value else [[1, 2]]
    if isinstance(value, str):
        others = {"shipped": "corrected", "corrected": "shipped", "test": "val", "float32": "exact"}
        digest = len(value) == 64 and value[::-1]
        return digest or others.get(value, value + "s")
    if value is None or isinstance(value, bool):
        return not value and 1.5
    return value + (1 if isinstance(value, int) else 2e-5)


def write_damaged(file, content, digest):
    """Write content with the digest it had (None), or with the one that it now should have."""
    if digest:
        content = {key: value for key, value in content.items() if key != "digest"}
        content["digest"] = digest(content)
    write_file(file, json.dumps(content))  # NaN too


@pytest.mark.parametrize("rehashed", [False, True], ids=["digest as it was", "digest made anew"])
def test_a_damaged_metrics_json(damaged, computed_once, verdict, compared, rehashed):
    """Every field damaged in every way: without a run the numbers have to follow, with one all has
    to be what it gives. Free text beside the numbers, re-hashed, is harmless."""
    run, commands = damaged
    file, tried = run / "eval-test/metrics.json", 0
    kept = read_json(file, "")
    assert [verdict(*commands[depth])[0] for depth in ("seconds", "hours")] == [0, 0]
    for place, kind, content in damages(kept, places(kept)):
        write_damaged(file, content, json_digest if rehashed else None)
        for depth in ("seconds", "hours"):
            if depth == "hours" or not rehashed or kind not in BLIND.get(place, ()):
                code, output = verdict(*commands[depth])
                close = place == ("model",) and kind == "changed" and depth == "hours"
                assert code in (1, 2) or close and code == 3, (place, kind, depth, output)
                tried += 1
    for name in HARMLESS:  # free text, as long as the digest is right
        write_damaged(file, {**kept, name: "another"}, json_digest if rehashed else None)
        assert verdict(*commands["hours"])[0] == (0 if rehashed else 2)
    compared(tried, "edits")


def test_numbers_made_to_follow_from_forged_predictions(damaged, verdict, compared):
    """A forger who computes everything anew passes without the run, and is found out by it."""
    run, commands = damaged
    file, splits = run / "eval-test/metrics.json", read_json(run / "splits.json", "")
    content = read_json(file, "")
    annotations = eval_script.DEAMHandler(run.parent.parent).annotations
    for song, values in content["predictions"].items():
        truth = annotations[int(song)][::2]
        values[:] = [round(0.5 * (a + b), 6) for a, b in zip(values, truth)]
    content["numbers"] = metrics.measure_split(
        annotations, splits, "test", content["predictions"], content["ridge_predictions"])
    write_damaged(file, content, json_digest)
    (run / "eval-test/predictions.csv").unlink()
    assert verdict(*commands["seconds"])[0] == 0
    code, output = verdict(*commands["hours"])
    assert code == 1 and output.count("  predictions.") == 20
    compared(20, "predictions")


@pytest.mark.parametrize("change, code", [(0, 0), (1e-6, 3), (0.0099, 3), (0.011, 1)])
def test_float32_may_be_close_and_exact_may_not(damaged, computed_once, verdict, compared, change,
                                               code):
    """A prediction that differs by less than 0.01 is CLOSE in float32, where the numbers follow."""
    run, commands = damaged
    file = run / "eval-test/metrics.json"
    for precision, expected in (("float32", code), ("exact", 1)):
        content = read_json(file, "")
        song = list(content["predictions"])[3]
        content["predictions"][song][0] += change if precision == "float32" else 0
        content |= {"precision": precision, "numbers": metrics.measure_split(
            eval_script.DEAMHandler(run.parent.parent).annotations,
            read_json(run / "splits.json", ""), "test", content["predictions"],
            content["ridge_predictions"])}
        write_damaged(file, content, json_digest)
        assert verdict(*commands["hours"])[0] == expected
    compared(2, "verdicts")


def test_damaged_tables(damaged, computed_once, verdict, compared):
    """Every column of digests.csv, history.csv and predictions.csv changed, a line left out,
    doubled or cut."""
    run, commands = damaged
    assert [verdict(*each)[0] for each in commands.values()] == [0, 0, 0]
    tried = 0
    for name, depth in (("digests.csv", "minutes"), ("history.csv", "minutes"),
                        ("eval-test/predictions.csv", "seconds")):
        kept = (run / name).read_text()
        lines = kept.splitlines()
        edits = ["", "\n".join(lines[:-1]), "\n".join([*lines, lines[-1]]), "\n".join(lines[1:]),
                 kept[:-20], "nothing\n"]
        for row in (1, len(lines) - 1):
            for column, cell in enumerate(lines[row].split(",")):
                middle = len(cell) // 2
                digit = "2" if cell[middle] == "1" else "1"
                for other in ("nan", "x", cell[:middle] + digit + cell[middle + 1:]):
                    cells = lines[row].split(",")
                    cells[column] = other
                    edits.append("\n".join([*lines[:row], ",".join(cells), *lines[row + 1:]]))
        for text in edits:
            write_file(run / name, text)
            code, output = verdict(*commands[depth])
            assert code in (1, 2), (name, text, output)
        write_file(run / name, kept)
        tried += len(edits)
    compared(tried, "edits")


def test_a_damaged_configuration(damaged, computed_once, verdict, compared):
    """Every setting, statistic and digest of config.json, and what splits.json says; the time and
    place of a run are free text."""
    run, commands = damaged
    tried = 0
    for name in ("config.json", "splits.json"):
        kept = read_json(run / name, "")
        fields = [(key,) for key in kept if key != "environment"] + [
            (key, inner) for key in ("config", "digests") for inner in kept.get(key, ())]
        for place, kind, content in damages(kept, fields):
            write_damaged(run / name, content, None)
            code = verdict(*commands["seconds"])[0]
            if code == 0:  # what the model does not hold is computed again
                code = verdict(*commands["minutes"])[0]
            assert code in (1, 2), (name, place, kind)
            tried += 1
        write_json(run / name, kept)
    config = read_json(run / "config.json", "")
    write_json(run / "config.json", {**config, "environment": {"cpu": "another"}})
    assert [verdict(*each)[0] for each in commands.values()] == [0, 0, 0]
    compared(tried, "edits")


@pytest.mark.parametrize("rehashed", [False, True], ids=["digest as it was", "digest made anew"])
def test_a_damaged_manifest(damaged, computed_once, verdict, compared, rehashed):
    """Every field; also by whoever computes its digest anew: it is in the run's configuration."""
    run, commands = damaged
    kept, tried = read_json(run / "manifest.json", ""), 0
    song = songs_of(run)[0]
    fields = [(key,) for key in kept if key not in ("digest", "source", "environment")] + [
        ("settings", key) for key in kept["settings"]] + [("songs", song)] + [
        ("songs", song, key) for key in kept["songs"][song]]
    for place, kind, content in damages(kept, fields):
        if rehashed:
            content["digest"] = json_digest({key: content.get(key) for key in (
                "settings", "annotations", "top_layers", "swapped_labels", "songs")})
        write_damaged(run / "manifest.json", content, None)
        codes = [verdict(*commands[depth])[0] for depth in ("seconds", "minutes")]
        assert set(codes) <= {1, 2}, (place, kind, codes)
        tried += 2
    compared(tried, "edits")


def test_a_manifest_of_other_songs_or_labels(demo, features, tmp_path, verdict, compared):
    """Extraction finds another PCM, other features, another length, other labels or layers above
    than a re-hashed manifest says."""
    kept, file = read_json(features / "manifest.json", ""), tmp_path / "manifest.json"
    song = next(iter(kept["songs"]))
    base = ("--deam", demo / "DEAM", "--weights", demo / "backbone", "--songs", song, "--device",
            "cpu", "--verify", file)
    entries = [{**kept["songs"][song], **change} for change in (
        {"pcm": "0" * 64}, {"features": "0" * 64}, {"frames": 3}, {"more": 1})]
    changes = [{}, {"annotations": "0" * 64}, {"top_layers": "0" * 64},
               {"swapped_labels": [[1, 9]]}, {"songs": {**kept["songs"], "999": entries[0]}},
               *({"songs": {song: entry}} for entry in entries)]
    for change in changes:
        content = {**kept, **change}
        write_json(file, {**content, "digest": manifest_digest(content)})
        code, output = verdict(extract, *base)
        assert code == bool(change) and output.count("DIFFERENT") == len(change), change
    compared(len(changes), "manifests")


def test_a_damaged_model(damaged, computed_once, verdict, compared):
    """A weight, the labels' mean, the splits' source: also with model.pt's own digest made anew."""
    run, commands = damaged
    good = read_tensors(run / "model.pt", "", eval_script.MODEL)
    name = next(iter(good["state"]))
    weights = {**good["state"], name: good["state"][name] + 1}
    edits = [{"state": weights}, {"mean": good["mean"] + 1}, {"std": good["std"] * 2},
             {"source": "DEAM"}, {"initial_model": "0" * 64},
             {"config": {**good["config"], "seed": 5}}]
    for change in edits:
        write_tensors(run / "model.pt", {**good, **change})
        assert [verdict(*commands[depth])[0] for depth in ("seconds", "hours")] == [2, 2], change
    data = bytearray((run / "model.pt").read_bytes())
    for place in np.linspace(0, len(data) - 1, 7).astype(int):
        other = bytearray(data)
        other[place] ^= 255
        write_file(run / "model.pt", other)
        assert verdict(*commands["seconds"])[0] == 2
    compared(len(edits) + 7, "edits")


def test_a_run_is_not_compared_with_itself(damaged, verdict, compared):
    """The file is read before anything is written, and nothing is written: a tampered file in the
    run's own folder stays as it is and is found out."""
    run, commands = damaged
    file = run / "eval-test/metrics.json"
    content = read_json(file, "")
    content["numbers"]["metrics"]["valence"]["r2"] = 0.9
    write_damaged(file, content, json_digest)
    before = contents(run)
    code, output = verdict(*commands["hours"])
    assert code == 1 and output.count("DIFFERENT") == 1
    assert "metrics.valence.r2" in output and "expected 0.9, found" in output
    assert before == contents(run)
    compared(len(before), "files")


def test_files_that_are_no_metrics(damaged, tmp_path, verdict, fails, compared):
    run, commands = damaged
    for name, text, says in (("no.json", "{}", "is not a metrics.json"),
                             ("list.json", "[]", "is not a metrics.json"),
                             ("broken.json", '{"a": ', "not valid JSON"),
                             ("none.json", None, "cannot read")):
        if text is not None:
            (tmp_path / name).write_text(text)
        assert says in fails(eval_script, run, "--verify", tmp_path / name)
    file = run / "eval-test/metrics.json"
    assert "name only one" in fails(eval_script, run, run, "--verify", file)
    assert "--deam PATH" in fails(eval_script, "--verify", file)
    code, output = verdict(*commands["hours"], "--split", "val")  # about other songs
    assert code == 1 and "split  " in output
    write_damaged(file, {**read_json(file, ""), "songs": 0, "predictions": {},
                         "ridge_predictions": {}}, json_digest)
    assert "two predictions for each of its songs" in fails(eval_script, "--verify", file,
                                                            "--deam", tmp_path)
    compared(8, "refusals")
