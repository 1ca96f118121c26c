# The base is pinned by digest (Python 3.11.16, multi-architecture index). Nothing is installed with apt, so the
# lock file and this digest are the whole environment.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b
FROM ${PYTHON_IMAGE}

# common.py sets the first four as well; here they also hold for whatever else is run in the image. LOGNAME, because
# torch asks for the user's name, and a user given with --user has none in the image.
ENV CUBLAS_WORKSPACE_CONFIG=:4096:8 \
    ATEN_CPU_CAPABILITY=avx2 \
    ONEDNN_MAX_CPU_ISA=AVX2 \
    MKL_CBWR=AVX2,STRICT \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    LOGNAME=kit \
    TORCH_HOME=/cache/torch \
    KAGGLEHUB_CACHE=/cache/kagglehub \
    MPLCONFIGDIR=/cache/matplotlib

WORKDIR /kit

# A layer of its own, so that a change of the code does not install again. The import fails the build where torch and
# torchaudio do not fit together.
COPY requirements.txt .
RUN python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary=:all: --requirement requirements.txt \
    && python -c "import torch, torchaudio"

COPY . .
# Any user may be the one who runs it (docker run --user), so that mounted folders get their owner's files.
RUN mkdir -p /cache && chmod -R a+rwX /kit /cache
USER 1000:1000

CMD ["sh", "-c", "python extract.py --deam demo --features demo/DEAM_feats --precision float64 --store float16 \
 && python train.py --finetune last1 --features demo/DEAM_feats --run demo/run --precision float64 --batch-size 8 --epochs 30 --step-size-up 50 --micro-batch 8 --device cpu \
 && python eval.py demo/run --features demo/DEAM_feats --verify tests/golden/demo.json"]
