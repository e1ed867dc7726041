# One image for everything that runs Python: `delineate serve` (nginx, API, workers), `delineate edge` (nginx alone),
# and one-shots such as `delineate buckets`. Built from Debian's packages and a lock file with hashes.
#
#     docker build -t delineate .

ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
RUN python3 -m venv --without-pip /opt/delineate && python3 -m venv pip
COPY requirements.lock ./
# Wheels only: no compiler is needed, and no package's setup code runs.
RUN pip/bin/pip --python /opt/delineate/bin/python install --quiet --no-cache-dir --no-compile \
        --require-hashes --no-deps --only-binary :all: -r requirements.lock
# Botocore brings the descriptions of 400 services, and one is used; other packages bring their tests.
RUN find /opt/delineate/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 -exec rm -rf {} + \
 && rm -rf /opt/delineate/lib/python3*/site-packages/botocore/data/s3/*/examples-1.json* \
 && find /opt/delineate/lib -type d \( -name test -o -name tests \) -prune -exec rm -rf {} +
COPY pyproject.toml README.md LICENSE ./
COPY delineate delineate
RUN pip/bin/pip wheel --quiet --no-cache-dir --no-deps --wheel-dir wheels . \
 && pip/bin/pip --python /opt/delineate/bin/python install --quiet --no-cache-dir --no-compile --no-deps wheels/*.whl \
 && find /opt/delineate -name __pycache__ -prune -exec rm -rf {} + \
 && find /opt/delineate -name '*.pyc' -delete \
 && find /opt/delineate -newermt @0 -exec touch --no-dereference --date=@0 {} + \
 && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/delineate/lib


FROM ${BASE}
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends python3 nginx \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* /etc/nginx /usr/share/doc /usr/share/man /usr/share/locale \
 && groupadd --gid 10001 delineate \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin delineate
COPY --from=build /opt/delineate /opt/delineate
COPY conf /app/conf
COPY supervisord.conf nginx.conf LICENSE /app/

ENV PATH=/opt/delineate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DELINEATE_ENV=production \
    DELINEATE_HOME=/tmp/delineate
WORKDIR /app
USER 10001:10001
EXPOSE 80 443
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["delineate", "healthcheck"]
ENTRYPOINT ["delineate"]
CMD ["serve"]

ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="delineate" \
      org.opencontainers.image.description="Self-hosted bulk downloads: many stored files in, one ZIP and a presigned URL out." \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
