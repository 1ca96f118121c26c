# The base is pinned by digest (Python 3.11.16, multi-architecture index). Nothing is installed with
# apt, so the lock file and this digest are the whole environment: the C compiler that Triton needs
# on a GPU is the lock's ziglang, Python's headers are the base's.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b
FROM ${PYTHON_IMAGE}

# LOGNAME, because torch asks for the user's name, and one given with --user has none in the image.
ENV PYTHONUNBUFFERED=1 \
    HOME=/cache \
    LOGNAME=kit \
    TORCH_HOME=/cache/torch \
    HF_HOME=/cache/huggingface \
    KAGGLEHUB_CACHE=/cache/kagglehub \
    MPLCONFIGDIR=/cache/matplotlib \
    TRITON_CACHE_DIR=/cache/triton \
    ZIG_GLOBAL_CACHE_DIR=/cache/zig

WORKDIR /kit

# A layer of its own, so that a change of the code does not install again. The import fails the
# build where torch and torchaudio do not fit together.
COPY requirements.txt .
RUN python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary=:all: \
        --requirement requirements.txt \
    && python -c "import torch, torchaudio"

COPY . .
# Any user may be the one who runs it (docker run --user), so that mounted folders get their owner's
# files.
RUN mkdir -p /cache && chmod -R a+rwX /kit /cache
USER 1000:1000

CMD ["bash", "tests/demo.sh"]
