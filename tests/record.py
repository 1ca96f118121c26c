"""What to publish of a run, in one file: all that the verdicts need; no audio, features, last.pt.

  python tests/record.py runs/last1                          # writes last1.tar
  python tests/record.py runs/last1 --features DEAM_feats    # where the printed commands find them
  tar xf last1.tar                                           # unpacked, it is what --verify takes

The same files give the same tar: sorted names, no times, no users. Two machines' tars may differ
(environment, bytes of model.pt and figures), which is why verdicts compare numbers and digests of
content. Those cover all but the figures: only the tar's sha256 stands for them.
"""

import io
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kit.cli import Parser, execute, path, start

RUN = ("manifest.json splits.json config.json history.csv digests.csv model.pt "
       "history.png history.pdf").split()
FIGURES = "true_vs_predicted", "plane", "confusion", "histograms"
EVALUATED = ["metrics.json", "predictions.csv", *(f"{figure}.{kind}" for figure in FIGURES
                                                  for kind in ("png", "pdf"))]


def parser():
    p = Parser(__doc__)
    p.add_argument("run", type=path, metavar="RUN", help="folder that train.py wrote, evaluated")
    p.share("--features", help="the folder of its features, for the commands that are printed")
    return p


def run(args):
    from cli import UserError  # all here: torch is slow to load
    from common import read_manifest
    from eval import read_metrics, read_run
    from files import sha256, write_file
    from train import read_digests

    folder, name = args.run, args.run.resolve().name
    evaluations = sorted(each.parent.name for each in folder.glob("eval-*/metrics.json"))
    if "eval-test" not in evaluations:
        raise UserError(f"{folder} is not complete: run eval.py {folder} first")
    names = sorted(RUN + [f"{each}/{file}" for each in evaluations for file in EVALUATED])
    if missing := ", ".join(each for each in names if not (folder / each).is_file()):
        raise UserError(f"{folder} is not complete: {missing} missing")
    _, content, _ = read_run(folder)
    if read_manifest(folder / "manifest.json")["digest"] != content["config"]["features"]:
        raise UserError(f"{folder}: manifest.json is not that of the run's features")
    if read_digests(folder)[-1][0] != content["config"]["epochs"]:
        raise UserError(f"{folder} is not complete: digests.csv ends before the last epoch")
    for each in evaluations:
        if read_metrics(folder / each / "metrics.json")["model"] != content["digest"]:
            raise UserError(f"{folder}/{each} is of another model: run eval.py {folder} again")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for each in names:
            data, entry = (folder / each).read_bytes(), tarfile.TarInfo(f"{name}/{each}")
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    write_file(f"{name}.tar", data := buffer.getvalue())
    print(f"{name}.tar: {len(names)} files, {len(data) / 1e6:.1f} MB\nsha256 {sha256(data)}\n"
          "Unpacked, it is checked in seconds and minutes by\n"
          f"  python eval.py --verify {name}/eval-test/metrics.json --deam PATH\n"
          f"  python extract.py --verify {name}/manifest.json --deam PATH --sample 5\n"
          f"  python train.py --verify {name} --steps 2 --features {args.features}")
    return 0


if __name__ == "__main__":
    execute(run, start(parser(), "rerun the same command"))
