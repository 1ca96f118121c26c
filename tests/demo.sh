# The demo, end to end: the Makefile, the image and the tests run this file, README shows it.
set -eu
rm -rf demo
python tests/demo.py demo
python extract.py --deam demo/DEAM --weights demo/backbone --splits demo/splits.json \
    --features demo/DEAM_feats
python train.py --finetune last1 --features demo/DEAM_feats --run demo/run --epochs 30 \
    --batch-size 8 --step-size-up 50
python eval.py demo/run --features demo/DEAM_feats --verify tests/golden/demo.json
echo "next: python verify.py demo/run --deam demo/DEAM --weights demo/backbone --features demo/DEAM_feats"
