# chispike for the nodes of a cluster. The image for NVIDIA GPUs, and one without CUDA, which is several GB smaller:
#
#   docker build -t chispike:0.1.0 --build-arg COMMIT=$(git describe --always --dirty --abbrev=40) .
#   docker build -t chispike:0.1.0-cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# COMMIT is the code version that runs record, since the image has no git; without it they record a hash of the code.
# Layers from what changes least to what changes most: system, torch, the other packages, the program.
FROM python:3.11.11-slim-bookworm

# g++ compiles the CPU kernels and Triton's launchers at their first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --create-home chispike

WORKDIR /app
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

COPY constraints.txt ./
ARG TORCH_INDEX=
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt torch

COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['s3'], sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY pipeline ./pipeline
COPY data_prep ./data_prep
COPY launch ./launch
ARG COMMIT=
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 CHISPIKE_COMMIT=$COMMIT
# COPY keeps the modes of the checkout, and under umask 077 none of it could be read by the image's user.
RUN chmod -R a+rX . && python -m compileall -q pipeline data_prep launch

USER 10001:10001
EXPOSE 9464
ENTRYPOINT ["python", "-m", "launch.supervise"]
CMD ["--help"]
