"""What is published of a run, checked as far as the inputs allow, then damaged in every file and
kind of field: none may leave REPRODUCED or exit code 0, in verify.py or eval.py --verify."""

import copy
import io
import itertools
import json
import math
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import FLOAT32, call, few, made_features

import common
import eval as eval_script
import exact
import train
import verify
from kit import cli, records, verdict as verdict_kit
from kit.deam import STATIC, labels_of, read_annotations
from kit.features import manifest_digest
from kit.files import (json_digest, read_json, read_tensors, sha256, tensor_digest, write_file,
                       write_json, write_tensors)
from kit.machine import environment
from kit.metrics import measure_split


@pytest.fixture
def verdict(capsys):
    """verdict(script, *arguments): its exit code and what it says; anything but one of the three
    verdicts or one line of error is an exception."""

    def attempt(script, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.execute(script.run, script.parser().parse_args([str(each) for each in arguments]))
        out, err = capsys.readouterr()
        code, words = stop.value.code, {0: "REPRODUCED:", 3: "CLOSE:", 1: "NOT REPRODUCED:"}
        if code != 2:
            verdicts = [line for line in out.splitlines() if line.startswith(tuple(words.values()))]
            assert len(verdicts) == 1 and verdicts[0].startswith(words[code]), out
        else:
            assert err.startswith("error: ") and "REPRODUCED" not in out, (out, err)
        return code, out + err

    return attempt


def different(output):
    """The names of what a verdict found to be different."""
    return re.findall(r"^    (.*): DIFFERENT, expected", output, re.M)


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
    """(a record of the short run, to be damaged; {how deep: the command line that checks it})."""
    run = shutil.copytree(short[0], tmp_path / "frozen", ignore=shutil.ignore_patterns(
        ".*", "last.pt"))
    shutil.copy(short[1] / "annotations.csv", tmp_path / STATIC)  # all of DEAM that this needs
    base, file = ("--features", short[1], "--device", "cpu"), run / "eval-test/metrics.json"
    return run, {"numbers": (verify, run, "--deam", tmp_path),
                 "steps": (verify, run, *base),
                 "all": (verify, run, *base, "--steps", "all"),
                 "eval": (eval_script, run, "--verify", file, *base)}


@pytest.fixture
def computed_once(monkeypatch):
    """What a verdict compares with stays the same while one file is damaged over and over: this
    machine's arithmetic, the numbers of the same predictions, the model of the same bytes, a run's
    evaluation."""

    def once(owner, name, key):
        function, kept = getattr(owner, name), {}

        def cached(*args, **settings):
            place = key(*args)
            if place not in kept:
                kept[place] = function(*args, **settings)
            return kept[place]

        monkeypatch.setattr(owner, name, cached)

    once(exact, "check", str)
    once(verdict_kit, "measure_split", lambda *args: json.dumps(args))
    once(eval_script, "evaluate", lambda args, folder, *_: folder)
    once(records, "read_model", lambda file: file.read_bytes())


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
            for path in folder.rglob("*")}


# --------------------------------------------------------------------------------------- the record


def test_a_record_is_complete_and_the_same_each_time(short, tmp_path, verdict, compared):
    """No features, no training state, no names, no times; it is checked first, and checked again as
    it is."""
    run, features = short
    tar = tmp_path / "frozen.tar"
    pack = verify, run, "--features", features, "--device", "cpu", "--pack", tar
    code, output = verdict(*pack)
    first = tar.read_bytes()
    assert code == 0 and f"sha256 {sha256(first)}" in output
    for path in run.rglob("*"):
        os.utime(path, (10**9, 10**9))
    assert verdict(*pack)[0] == 0 and tar.read_bytes() == first
    with tarfile.open(tar) as file:
        entries = file.getmembers()
        packed = {entry.name.removeprefix("frozen/"): file.extractfile(entry).read()
                  for entry in entries}
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.mode)
            for entry in entries} == {(0, 0, 0, "", "", 0o644)}
    assert packed == {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*")
                      if path.is_file() and path.name != "last.pt" and path.name[0] != "."}
    code, again = verdict(verify, tar, "--features", features, "--device", "cpu")
    parts = re.compile(r"^  .*", re.M)
    assert code == 0 and parts.findall(again) == parts.findall(output)
    compared(len(entries), "files")


def test_what_is_not_complete_or_not_true_is_not_packed(short, tmp_path, verdict, fails, compared):
    run, tar, count = shutil.copytree(short[0], tmp_path / "run"), tmp_path / "run.tar", 0
    files = [path for path in run.rglob("*") if path.is_file() and path.name[0] != "."]
    for path in files:
        path.rename(tmp_path / "aside")
        if path.name == "last.pt":
            (tmp_path / "aside").rename(path)
            continue
        says = {"metrics.json": "run eval.py"}
        assert says.get(path.name, path.name) in fails(verify, run, "--pack", tar)
        (tmp_path / "aside").rename(path)
        count += 1
    kept = read_json(run / "eval-test/metrics.json", "")
    write_damaged(run / "eval-test/metrics.json", {**kept, "model": "0" * 64}, json_digest)
    code, output = verdict(verify, run, "--pack", tar)
    assert code == 1 and different(output) == ["eval-test: model"]
    shutil.rmtree(run / "eval-test")
    assert "is not evaluated: run eval.py" in fails(verify, run, "--pack", tar)
    assert "without RECORD" in fails(verify, "--features", run, "--pack", tar)
    assert not tar.exists()
    compared(count + 3, "refusals")


def test_a_fold_without_pictures_is_packed(short, tmp_path, compared):
    """eval.py draws none of folds that it pools; and a long name is shortened in the tar."""
    run, tar = shutil.copytree(short[0], tmp_path / "run"), tmp_path / f"{'曲' * 60}.tar"
    for name in records.FIGURES:
        (run / "eval-test" / name).unlink()
    assert call(verify, run, "--pack", tar) == 0
    with tarfile.open(tar) as packed:
        names = [entry.name.partition("/")[2] for entry in packed]
    assert "eval-test/metrics.json" in names
    assert not {*records.FIGURES} & {Path(each).name for each in names}
    compared(len(names), "files")


def test_a_tar_of_other_things(short, tmp_path, fails, compared):
    """Only what --pack writes is unpacked, and nothing outside of the folder for it."""
    tar, outside = tmp_path / "a/b.tar", tmp_path / "evil"
    tar.parent.mkdir()
    tar.write_bytes(b"no tar")
    assert "neither a run's folder nor a .tar" in fails(verify, tar)
    assert "neither a run's folder nor a .tar" in fails(verify, tmp_path / "none.tar")
    with tarfile.open(tar, "w") as file:
        for name in ("run/../../evil/config.json", f"{outside}/model.pt", "run/../evil/splits.json",
                     "run/strange.json"):
            entry = tarfile.TarInfo(name)
            entry.size = 2
            file.addfile(entry, io.BytesIO(b"{}"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            entry = tarfile.TarInfo("run/config.json")
            entry.type, entry.linkname = kind, str(short[0] / "config.json")
            file.addfile(entry)
    before = set(tmp_path.rglob("*"))
    assert "config.json" in fails(verify, tar)
    assert set(tmp_path.rglob("*")) == before
    compared(3, "refusals")


def test_the_demos_record(clone, verdict, monkeypatch, compared):
    """In exact arithmetic, with two of its songs and two steps; nothing is written, nor need it be
    possible to."""
    demo = clone[0] / "demo"
    before = contents(demo / "run")

    def refuse(*_, **__):
        raise PermissionError("a verdict writes nothing")

    for owner, name in ((os, "replace"), (os, "mkdir"), (Path, "mkdir"), (Path, "write_bytes")):
        monkeypatch.setattr(owner, name, refuse)
    code, output = verdict(verify, demo / "run", "--deam", demo / "DEAM", "--weights",
                           demo / "backbone", "--sample", 2, "--features", demo / "DEAM_feats",
                           "--device", "cpu")
    parts = ("files of one run", "numbers, from predictions and labels",
             "PCM and features of 2 of 60 songs", "features, configuration and initial model",
             "2 of 150 steps of training", "predictions of the published model")
    assert code == 0 and output.splitlines()[-1] == f"REPRODUCED: {'; '.join(parts)}"
    counts = [int(re.search(rf"^  {re.escape(part)}: identical (\d+)$", output, re.M)[1])
              for part in parts]
    assert min(counts) >= 8, counts
    assert before == contents(demo / "run")
    compared(sum(counts), "values")


def test_each_part_that_is_not_checked_names_its_option(damaged, trained, demo, tmp_path, verdict,
                                                        fails, compared):
    """And what the inputs allow is repeated: of a run without evaluation too."""
    run, commands = damaged
    for options, skipped in (((), {"numbers": "--deam PATH", "PCM and features": "--deam PATH",
                                   "training": "--features FOLDER"}),
                             (commands["numbers"][2:], {"PCM and features": "--deam PATH",
                                                        "training": "--features FOLDER"}),
                             (commands["steps"][2:], {"PCM and features": "--deam PATH"})):
        code, output = verdict(verify, run, *options)
        found = dict(re.findall(r"^  ([^:\n]*): not checked, (.*)$", output, re.M))
        assert code == 0 and found.keys() == skipped.keys()
        assert all(option in found[part] for part, option in skipped.items())
        assert output.splitlines()[-1].endswith(f"not checked: {'; '.join(skipped)}")
    code, output = verdict(verify, trained, "--deam", demo / "DEAM", "--weights",
                           tmp_path / "none")
    assert code == 2 and "none" in output
    code, output = verdict(verify, trained, "--deam", demo / "DEAM")  # its backbone was a folder
    assert f"numbers: not checked, run eval.py {trained} first" in output
    assert "name a RECORD, or --features FOLDER" in fails(verify)
    compared(7, "parts not checked")


@pytest.fixture(scope="module")
def one_song(demo, ids, tmp_path_factory):
    """DEAM with the audio of one song of the demo."""
    return shutil.copytree(demo / "DEAM", tmp_path_factory.mktemp("one") / "DEAM",
                           ignore=lambda _, names: [name for name in names if name.endswith(".wav")
                                                    and name != f"{ids[0]}.wav"])


def test_songs_are_drawn_from_those_with_audio(demo, trained, ids, one_song, tmp_path, verdict,
                                               monkeypatch, compared):
    """Another sample each time; a song that cannot be read is different."""
    command = verify, trained, "--weights", demo / "backbone", "--device", "cpu", "--deam"
    drawn, compute = [], verify.compute_entry
    monkeypatch.setattr(verify, "compute_entry", lambda deam, backbone, song, store: drawn.append(
        int(song)) or compute(deam, backbone, song, store))
    for _ in range(2):
        code, output = verdict(*command, demo / "DEAM", "--sample", 3)
        assert code == 0
        assert re.search(r"^  PCM and features of 3 of 60 songs: identical \d\d$", output, re.M)
    assert len(set(drawn)) > 3 and set(drawn) <= set(ids)
    code, output = verdict(*command, one_song)
    assert code == 0 and drawn[6:] == ids[:1]
    empty = shutil.copytree(one_song, tmp_path / "DEAM")
    next(empty.rglob("*.wav")).write_bytes(b"")
    code, output = verdict(*command, empty)
    assert code == 1 and different(output) == [f"song {ids[0]}: {key}" for key in (
        "pcm", "features", "frames")]
    compared(len(drawn), "songs")


def test_verifying_asks_for_the_songs_of_its_steps(short, tmp_path, verdict, compared):
    """One step needs the songs of one batch, an epoch's last also those of val; with the features
    of these alone it is repeated."""
    run, features = short
    few = shutil.copytree(features, tmp_path / "f", ignore=shutil.ignore_patterns("*.pt"))
    shutil.copy(features / "top_layers.pt", few)
    command = verify, run, "--features", few, "--device", "cpu"
    for steps, count in (("1", 20), ("2", 30)):
        code, output = verdict(*command, "--steps", steps)
        songs = re.search(rf"^  {steps} of 4 steps of training: not checked, .* lacks features of "
                          rf"{count} songs: run its extract.py command with --songs ([\d ]*)$",
                          output, re.M)[1].split()
        assert code == 0 and len(songs) == count
        for song in songs:
            shutil.copy(features / f"songs/{song}.pt", few / "songs")
        code, output = verdict(*command, "--steps", steps)
        assert code == 0 and f"{steps} of 4 steps of training: identical" in output
    code, output = verdict(*command, "--steps", 3)  # on to the next that has a digest
    assert code == 0 and "4 of 4 steps of training: identical" in output
    compared(4, "steps")


# ------------------------------------------------------------------------------------------ damage

KINDS = ("changed", math.nan, None, "valence", {}, "removed")  # the others: what stands there then
HARMLESS = ("run", "environment")  # free text, beside the numbers: what it says decides nothing


def places(content):
    """One place of every kind of field in a metrics.json: paths of keys."""
    song = list(content["predictions"])[-1]
    yield from ((key,) for key in content if key not in ("digest", *HARMLESS))
    yield from (("predictions", song, 0), ("ridge_predictions", song, 1), ("predictions", song))
    for key, value in content["numbers"].items():
        yield "numbers", key
        inside = [(key, inner) for inner in value] if isinstance(value, dict) else [(key,)]
        for place in inside:
            inner = value[place[1]] if place[1:] else value
            while isinstance(inner, (dict, list)):  # down to the last number
                last = len(inner) - 1 if isinstance(inner, list) else list(inner)[-1]
                place, inner = (*place, last), inner[last]
            yield "numbers", *place


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
    """Another value of the same kind."""
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
    """Every field damaged in every way: from labels alone the numbers have to follow, with features
    all has to be what the run gives. Free text beside the numbers, re-hashed, is harmless."""
    run, commands = damaged
    file, tried = run / "eval-test/metrics.json", 0
    kept = read_json(file, "")
    assert [verdict(*each)[0] for each in commands.values()] == [0] * 4
    for place, kind, content in damages(kept, places(kept)):
        write_damaged(file, content, json_digest if rehashed else None)
        for depth in ("numbers", "eval"):
            code, output = verdict(*commands[depth])
            if rehashed and depth == "numbers" and (place, kind) == (("ridge_penalty",), "changed"):
                assert verdict(*commands["all"])[0] == 1  # no number follows from it
            else:
                close = place == ("model",) and kind == "changed" and depth == "eval"
                assert code in (1, 2) or close and code == 3, (place, kind, depth, output)
            tried += 1
    for name in HARMLESS:  # free text, as long as the digest is right
        write_damaged(file, {**kept, name: "another"}, json_digest if rehashed else None)
        for depth in ("numbers", "eval"):
            assert verdict(*commands[depth])[0] == (0 if rehashed else 2)
    compared(tried, "edits")


def forged(run, change, annotations):
    """Predictions changed by change(values, true values), and every number that follows."""
    content = read_json(run / "eval-test/metrics.json", "")
    for song, values in content["predictions"].items():
        true = labels_of(annotations, [int(song)])[0].tolist()
        values[:] = [round(value, 6) for value in change(values, true)]
    content["numbers"] = measure_split(
        annotations, read_json(run / "splits.json", ""), "test", content["predictions"],
        content["ridge_predictions"])
    write_damaged(run / "eval-test/metrics.json", content, json_digest)
    write_file(run / "eval-test/predictions.csv",
               records.predictions_table(content["predictions"], annotations))


def test_numbers_made_to_follow_from_forged_predictions(damaged, short, verdict, compared):
    """A forger who computes everything anew passes without the features, and is found out by what
    the published model predicts."""
    run, commands = damaged
    forged(run, lambda values, true: [(a + b) / 2 for a, b in zip(values, true)],
           read_annotations(short[1] / "annotations.csv"))
    assert verdict(*commands["numbers"])[0] == 0
    for depth in ("steps", "all", "eval"):
        code, output = verdict(*commands[depth])
        assert code == 1 and len(different(output)) == 20
        assert all(name.startswith("predictions.") for name in different(output))
    compared(20, "predictions")


@pytest.mark.parametrize("change, code", [(0, 0), (1e-6, 3), (0.0099, 3), (0.011, 1)])
def test_float32_may_be_close_and_exact_may_not(damaged, short, computed_once, verdict, compared,
                                                change, code):
    """A prediction that differs by less than 0.01 is CLOSE in float32, where the numbers follow."""
    run, commands = damaged
    annotations, file = (read_annotations(short[1] / "annotations.csv"),
                         run / "eval-test/metrics.json")
    forged(run, lambda values, _: [values[0] + change, values[1]], annotations)
    assert [verdict(*commands[depth])[0] for depth in ("eval", "all")] == [code, code]
    write_damaged(file, {**read_json(file, ""), "precision": "exact"}, json_digest)
    assert [verdict(*commands[depth])[0] for depth in ("eval", "all")] == [1, 1]
    compared(4, "verdicts")


def slightly_other(monkeypatch, machine, factor):
    """Arithmetic that gives other bits, on the machine of a CPU's name."""
    loss, states = train.emotion_loss, common.Backbone.hidden_states
    monkeypatch.setattr(train, "emotion_loss", lambda *args: loss(*args) * factor)
    monkeypatch.setattr(common.Backbone, "hidden_states", lambda *args: states(*args) * factor)
    monkeypatch.setattr(verify, "environment", lambda device: {**environment(device), **machine})


@pytest.mark.parametrize("machine, factor, codes", [
    ({}, 1 + 1e-6, [1, 1]), ({"cpu": "another"}, 1 + 1e-6, [3, 3]), ({"cpu": "another"}, 1, [0, 0]),
    ({"torch": "another"}, 1.2, [1, 1])], ids=["here", "elsewhere", "the same", "too far"])
def test_float32_is_close_on_another_machine(damaged, verdict, monkeypatch, compared, machine,
                                             factor, codes):
    """Where losses, not only predictions, are near those of the record. On one kind of machine
    every bit has to be the same."""
    run, commands = damaged
    slightly_other(monkeypatch, machine, factor)
    outputs = [verdict(*commands[depth]) for depth in ("steps", "all")]
    assert [code for code, _ in outputs] == codes
    if codes == [3, 3]:
        assert re.search("^    step 1: state: close, expected .*\n    step 2: loss: close",
                         outputs[0][1], re.M)
        assert "    model: close" in outputs[1][1]
        assert "predictions of the published model and of the repeated one" in outputs[1][1]
    compared(2, "verdicts")


def test_an_option_forged_where_float32_may_be_close(damaged, verdict, monkeypatch, compared):
    """Another seed, another device: the first is found out on any machine."""
    run, commands = damaged
    slightly_other(monkeypatch, {"cpu": "another"}, 1)
    config, model = read_json(run / "config.json", ""), read_tensors(run / "model.pt", "",
                                                                     records.MODEL)
    for change, code in (({"seed": 1}, 1), ({"device": "cuda"}, 3)):
        content = {**config["config"], "options": {**config["config"]["options"], **change}}
        write_json(run / "config.json", {**config, "config": content})
        write_tensors(run / "model.pt", {**model, "config": content})
        assert verdict(*commands["steps"])[0] == code
    compared(2, "verdicts")


def test_features_of_float32_are_close_on_another_machine(demo, short, trained, one_song, tmp_path,
                                                          verdict, monkeypatch, compared):
    """Of the same PCM; then training goes on with them, its losses near those of the record."""
    base = verify, trained, "--weights", demo / "backbone", "--device", "cpu", "--deam", one_song
    for machine, code in (({}, 1), ({"cpu": "another"}, 3)):
        with monkeypatch.context() as patch:
            slightly_other(patch, machine, 1 + 1e-6)
            assert verdict(*base)[0] == code
    run, features = short
    elsewhere = shutil.copytree(features, tmp_path / "DEAM_feats")
    manifest = read_json(elsewhere / "manifest.json", "")
    for song, entry in manifest["songs"].items():
        file = elsewhere / f"songs/{song}.pt"
        states = torch.load(file)
        torch.save(states := states * (1 + 1e-6 * torch.rand_like(states)), file)
        entry["features"] = tensor_digest(states)
    manifest["digest"] = manifest_digest(manifest)
    for machine, code in ((None, 1), ({"cpu": "another"}, 3)):
        write_json(elsewhere / "manifest.json", {**manifest, "environment": machine})
        assert verdict(verify, run, "--features", elsewhere, "--device", "cpu")[0] == code
    compared(4, "verdicts")


def test_damaged_tables(damaged, computed_once, verdict, compared):
    """Every column of digests.csv, history.csv and predictions.csv changed, a line left out,
    doubled or cut."""
    run, commands = damaged
    tried = 0
    for name, depth in (("digests.csv", "all"), ("history.csv", "all"),
                        ("eval-test/predictions.csv", "numbers")):
        kept = (run / name).read_text()
        lines = kept.splitlines()
        edits = ["", "\n".join(lines[:-1]), "\n".join([*lines, lines[-1]]), "\n".join(lines[1:]),
                 kept[:-20], "nothing\n"]
        for row in (1, len(lines) - 1):
            for column, cell in enumerate(lines[row].split(",")):
                middle = len(cell) // 2
                digit = "2" if cell[middle] == "1" else "1"
                for other in ("nan", "x", "9" * 401, cell[:middle] + digit + cell[middle + 1:]):
                    cells = lines[row].split(",")
                    cells[column] = other
                    edits.append("\n".join([*lines[:row], ",".join(cells), *lines[row + 1:]]))
        for text in edits:
            write_file(run / name, text)
            code, output = verdict(*commands["numbers"])
            if code == 0:  # what no other file says is computed again
                code, output = verdict(*commands[depth])
            assert code in (1, 2), (name, text, output)
        write_file(run / name, kept)
        tried += len(edits)
    compared(tried, "edits")


def test_a_damaged_configuration(damaged, computed_once, verdict, compared):
    """Every option, statistic and digest of config.json, and what splits.json says; the time and
    place of a run are free text."""
    run, commands = damaged
    tried = 0
    for name in ("config.json", "splits.json"):
        kept = read_json(run / name, "")
        fields = [(key,) for key in kept if key != "environment"] + [
            (key, inner) for key in ("config", "digests") for inner in kept.get(key, ())]
        fields += [("config", key, inner) for key in ("options", "songs")
                   for inner, value in kept.get("config", {}).get(key, {}).items()
                   if value is not None]
        for place, kind, content in damages(kept, fields):
            write_damaged(run / name, content, None)
            code, output = verdict(*commands["numbers"])
            if code == 0:  # what the model does not hold is computed again
                code, output = verdict(*commands["all"])
            close = kind == "changed" and place[0] == "digests" and "    val predictions" in output
            assert code in (1, 2) or close and code == 3, (name, place, kind, output)
            tried += 1
        write_json(run / name, kept)
    config = read_json(run / "config.json", "")
    write_json(run / "config.json", {**config, "environment": {"cpu": "another"}})
    assert [verdict(*each)[0] for each in commands.values()] == [0] * 4
    compared(tried, "edits")


def test_options_forged_in_both_files(damaged, computed_once, verdict, compared):
    """In config.json and model.pt alike, with all digests made anew: what the options say is what
    the run did, as far as it decides anything in this one."""
    run, commands = damaged
    config, model = read_json(run / "config.json", ""), read_tensors(run / "model.pt", "",
                                                                     records.MODEL)
    options, tried = config["config"]["options"], 0
    edits = {"seed": 1, "lr": 1e-4, "epochs": 3, "batch_size": 19, "schedule": "cosine",
             "step_size_up": 50, "lambda_corr": 0.0, "lambda_var": 0.5, "corr_target": "zero",
             "weight_decay": 0.1, "grad_clip": 0.5, "max_lr": 0.01, "weight_loss": True,
             "labels": "corrected", "finetune": "last1", "precision": "exact", "fold": 3,
             "device": "cuda", "strange": 1}
    without_effect = {"select": "best", "frozen_dropout": True, "micro_batch": 1, "threads": 1}
    assert edits.keys() - {"strange"} | without_effect.keys() == options.keys()
    forgeries = [{**options, name: value} for name, value in edits.items()]
    forgeries += [{key: value for key, value in options.items() if key != name}
                  for name in options.keys() - {"threads"} if options[name] is not None]
    for forgery in forgeries:
        content = {**config["config"], "options": forgery}
        write_json(run / "config.json", {**config, "config": content})
        write_tensors(run / "model.pt", {**model, "config": content})
        code, output = verdict(*commands["all"])
        assert code in (1, 2), (forgery, output)
        tried += 1
    compared(tried, "edits")


@pytest.mark.parametrize("rehashed", [False, True], ids=["digest as it was", "digest made anew"])
def test_a_damaged_manifest(damaged, computed_once, verdict, compared, rehashed):
    """Every field; also by whoever computes its digest anew: it is in the run's configuration."""
    run, commands = damaged
    kept, tried = read_json(run / "manifest.json", ""), 0
    song = next(iter(kept["songs"]))
    fields = [(key,) for key in kept if key not in ("digest", "source", "environment")] + [
        ("settings", key) for key in kept["settings"]] + [("songs", song)] + [
        ("songs", song, key) for key in kept["songs"][song]] + [("source", "name")]
    for place, kind, content in damages(kept, fields):
        if rehashed:
            content["digest"] = json_digest({key: content.get(key) for key in (
                "settings", "annotations", "top_layers", "swapped_labels", "songs")})
        write_damaged(run / "manifest.json", content, None)
        code, output = verdict(*commands["numbers"])
        assert code in (1, 2), (place, kind, output)
        tried += 1
    compared(tried, "edits")


def test_a_manifest_of_other_songs_or_labels(demo, trained, ids, one_song, tmp_path, verdict,
                                             compared):
    """Extraction finds another PCM, other features, another length, other labels or layers above
    than a re-hashed manifest says, and other settings."""
    run = shutil.copytree(trained, tmp_path / "run")
    kept, file = read_json(run / "manifest.json", ""), run / "manifest.json"
    song, base = str(ids[0]), (verify, run, "--deam", one_song, "--weights", demo / "backbone",
                               "--device", "cpu")
    entries = {f"song {song}: {key}": {**kept["songs"][song], key: value} for key, value in (
        ("pcm", "0" * 64), ("features", "0" * 64), ("frames", 3))}
    entries[f"song {song}: more"] = {**kept["songs"][song], "more": 1}
    changes = {"annotations": {"annotations": "0" * 64}, "top layers": {"top_layers": "0" * 64},
               "swapped labels": {"swapped_labels": [[1, 9]]},
               "settings.weights": {"settings": {**kept["settings"], "weights": "0" * 64}},
               "settings.normalize_epsilon": {"settings": {**kept["settings"],
                                                           "normalize_epsilon": 1e-7}},
               **{name: {"songs": {**kept["songs"], song: entry}}
                  for name, entry in entries.items()}}
    for name, change in changes.items():
        content = {**kept, **change}
        write_json(file, {**content, "digest": manifest_digest(content)})
        code, output = verdict(*base)
        found = {each.split("[")[0] for each in different(output) if not each.startswith(
            ("manifest.json", "settings of the features", "settings of model.pt"))}
        assert code == 1 and len(found) == 1 and found.pop().startswith(name), output
    write_json(file, {**kept, "songs": {song: kept["songs"][song]}})
    assert "does not match its own digest" in verdict(*base)[1]
    compared(len(changes), "manifests")


def test_a_damaged_model(damaged, computed_once, verdict, compared):
    """A weight, the labels' mean, the splits' source: also with model.pt's own digest made anew."""
    run, commands = damaged
    good = read_tensors(run / "model.pt", "", records.MODEL)
    name = next(iter(good["state"]))
    weights = {**good["state"], name: good["state"][name] + 1}
    options = {**good["config"]["options"], "seed": 5}
    edits = [{"state": weights}, {"mean": good["mean"] + 1}, {"std": good["std"] * 2},
             {"source": "DEAM"}, {"initial_model": "0" * 64},
             {"config": {**good["config"], "options": options}}]
    for change in edits:
        write_tensors(run / "model.pt", {**good, **change})
        assert [verdict(*commands[depth])[0] for depth in ("numbers", "eval")] == [2, 2], change
    write_tensors(run / "model.pt", {**good, "backbone": {"name": "another"}})
    assert different(verdict(*commands["numbers"])[1]) == ["backbone.name"]
    compared(len(edits) + 1, "edits")


def test_another_model_with_its_digests_made_anew(damaged, short, verdict, compared):
    """A weight changed, and its digest in model.pt, config.json, digests.csv and metrics.json: the
    files fit together, but it predicts something else, and training gives another."""
    run, commands = damaged
    content, config = (read_tensors(run / "model.pt", "", records.MODEL),
                       read_json(run / "config.json", ""))
    old = config["digests"]["model"]
    content["state"]["valence.6.bias"] += 0.1
    write_tensors(run / "model.pt", content)
    new = records.read_model(run / "model.pt")["digest"]
    for file in (run / "config.json", run / "digests.csv"):
        write_file(file, file.read_text().replace(old, new))
    file = run / "eval-test/metrics.json"
    write_damaged(file, {**read_json(file, ""), "model": new}, json_digest)
    assert [verdict(*commands[depth])[0] for depth in ("numbers", "steps", "all", "eval")] == [
        0, 1, 1, 1]
    compared(4, "verdicts")


def test_a_run_is_not_compared_with_itself(damaged, verdict, compared):
    """The file is read before anything is written, and nothing is written: a tampered file in the
    run's own folder stays as it is and is found out."""
    run, commands = damaged
    file = run / "eval-test/metrics.json"
    content = read_json(file, "")
    content["numbers"]["metrics"]["valence"]["r2"] = 0.9
    write_damaged(file, content, json_digest)
    before = contents(run)
    for depth in ("eval", "numbers", "steps", "all"):
        code, output = verdict(*commands[depth])
        assert code == 1 and different(output) == ["metrics.valence.r2"]
        assert "expected 0.9, actual" in output
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
    code, output = verdict(*commands["eval"], "--split", "val")  # about other songs
    assert code == 1 and "split" in different(output)
    write_damaged(file, {**read_json(file, ""), "songs": 0, "predictions": {},
                         "ridge_predictions": {}}, json_digest)
    assert "two predictions for each of its songs" in fails(*commands["numbers"])
    compared(7, "refusals")
