# The server in a container.
#
#   make image        with docker or buildah; deploy/README.md says more
#
# The only model inside is the demo model. For a GPU no other base is needed: torch's wheels for
# Linux bring the CUDA libraries, and the driver comes from the host.

ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY deploy/requirements requirements
# Everything but torch by hash. It is first, so that torch finds what it needs and installs no other
# version; only NVIDIA's libraries come with torch, which pins their versions.
RUN python3 -m venv /opt/darkroom \
    && /opt/darkroom/bin/pip install --require-hashes --no-deps -r requirements/server.txt
ARG TORCH=2.13.0
RUN /opt/darkroom/bin/pip install "torch==${TORCH}"
COPY protos protos
COPY server server
RUN python3 -m venv tools \
    && tools/bin/pip install --require-hashes --no-deps -r requirements/build.txt \
    && tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./protos ./server \
    && /opt/darkroom/bin/pip install --no-deps wheels/*.whl \
    && /opt/darkroom/bin/pip check

FROM ${BASE}
# The home is of group 0: a user that the image does not know, as OpenShift makes them up, is in it.
RUN groupadd --gid 10001 darkroom \
    && useradd --uid 10001 --gid darkroom --home-dir /var/lib/darkroom darkroom \
    && install -d -o darkroom -g 0 -m 0775 \
        /var/lib/darkroom /var/lib/darkroom/huggingface /var/lib/darkroom/state
COPY --from=build /opt/darkroom /opt/darkroom
# Plaintext for everybody, unless certificates and tokens are given: docs/security.md.
ENV PATH=/opt/darkroom/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/darkroom \
    HF_HOME=/var/lib/darkroom/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DARKROOM_SERVE_STATE_DIR=/var/lib/darkroom/state \
    DARKROOM_SERVE_HOST=0.0.0.0 \
    DARKROOM_SERVE_METRICS_HOST=0.0.0.0 \
    DARKROOM_SERVE_HTTP_HOST=0.0.0.0 \
    DARKROOM_SERVE_HTTP_PORT=8000 \
    DARKROOM_SERVE_INSECURE=true \
    DARKROOM_SERVE_DRAIN_DELAY=3
USER 10001:10001
WORKDIR /var/lib/darkroom
# Nothing else is written: the root file system may be read-only.
VOLUME /var/lib/darkroom/huggingface /var/lib/darkroom/state
# gRPC, HTTP, and Prometheus metrics
EXPOSE 50051 8000 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["darkroom-server", "healthcheck"]
ENTRYPOINT ["darkroom-server"]
CMD ["serve"]
