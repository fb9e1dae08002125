# WeakCLIP and all that it needs, for Docker, Podman, Apptainer and pyxis. How to use it: docs/cluster.md, "In a container".
#
#     make image                                                                     # for CPUs
#     make image ARGS="--build-arg BASE=docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04 \
#                      --build-arg TORCH_INDEX=https://pypi.org/simple"              # for GPUs: PyPI's torch 2.13 has CUDA 13.0
#
# Debian's packages have no pinned versions: the archive keeps only the latest of a release, which has the security fixes.
# hadolint global ignore=DL3008

# A Debian or Ubuntu whose python3 is 3.11 or 3.12: numpy needs 3.11, and pydensecrf2 does not compile on 3.13. torch brings its
# own CUDA libraries; what a CUDA base adds are the variables by which the container gets the GPUs.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS python
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

# The compiler is for pydensecrf2, which has no wheels. It stays in this stage.
FROM python AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/weakclip
ENV PATH=/opt/weakclip/bin:$PATH
WORKDIR /src
# The dependencies come first and alone: a change of the code then leaves their layer as it is.
COPY pyproject.toml constraints.txt ./
# constraints.txt has torch 2.x+cpu, which PyPI has not. Without the "+cpu" this index decides, since pip prefers its 2.x+cpu, or
# its 2.x+cu126, to PyPI's 2.x.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN sed --in-place 's/^\(torch==.*\)+cpu$/\1/' constraints.txt \
    && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
         print(*p['dependencies'], *p['optional-dependencies']['remote'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .

FROM python
# scontrol and munge's library, by which a job of launch/submit.py puts itself into the queue again. They need the cluster's
# /etc/slurm (or what SLURM_CONF names) and /run/munge mounted. munge's daemon, which comes along, never runs here, and the key
# that its package makes must not be in an image.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libmunge2 slurm-client \
    && rm -rf /var/lib/apt/lists/* /etc/munge/munge.key \
    && useradd --uid 10001 --create-home --key HOME_MODE=0755 weakclip
COPY --from=build /opt/weakclip /opt/weakclip
ENV PATH=/opt/weakclip/bin:$PATH
# Docker's user. Apptainer and pyxis run the image as whoever starts it, as `docker run --user` does: others may read all of it.
USER 10001
WORKDIR /home/weakclip
COPY configs configs
# No ENTRYPOINT: enroot would put it before the command of every job.
CMD ["python", "-m", "weakclip.train", "--help"]
