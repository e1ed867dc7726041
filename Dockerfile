# One image for everything that runs Python: `delineate serve` (nginx, API, workers), `delineate edge` (nginx alone),
# and one-shots such as `delineate buckets`. Built from Debian's packages and a lock file with hashes.
#
#     docker build -t delineate .
#
# Two builds of one commit have the same files with the same times (SOURCE_DATE_EPOCH), and the same layer of delineate;
# that of Debian's packages differs in the time of /etc.

ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends python3 python3-venv
WORKDIR /build
RUN python3 -m venv --without-pip /image/opt/delineate && python3 -m venv pip
COPY requirements.lock ./
# Wheels only: no compiler is needed, and no package's setup code runs.
RUN pip/bin/pip --python /image/opt/delineate/bin/python install --quiet --no-cache-dir --no-compile \
        --require-hashes --no-deps --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY delineate delineate
RUN pip/bin/pip --python /image/opt/delineate/bin/python install --quiet --no-cache-dir --no-compile --no-deps .
COPY supervisord.conf nginx.conf LICENSE /image/app/
COPY conf /image/app/conf
# `supervisorctl status` finds this file in the working directory, and by it the container's own supervisord.
RUN sed -i 's|^serverurl=.*|serverurl=unix://%(ENV_DELINEATE_HOME)s/run/supervisor.sock|' /image/app/supervisord.conf
# Botocore brings the descriptions of 400 services, and one is used; other packages bring their tests. Scripts and
# pyvenv.cfg name the place where they are going to be. Bytecode is made here: the root may be read-only later.
ARG SOURCE_DATE_EPOCH=0
RUN cd /image/opt/delineate/lib/python3*/site-packages \
 && find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 -exec rm -rf {} + \
 && rm -rf botocore/data/s3/*/examples-1.json* delineate-*.dist-info/direct_url.json \
 && find . -type d \( -name test -o -name tests -o -name __pycache__ \) -prune -exec rm -rf {} + \
 && sed -i 's|/image/opt/delineate|/opt/delineate|g' \
        /image/opt/delineate/pyvenv.cfg $(grep -rlI '^#!.*/image/opt' /image/opt/delineate/bin) \
 && rm -f /image/opt/delineate/bin/activate* /image/opt/delineate/bin/Activate.ps1 \
 && PYTHONHASHSEED=0 python3 -m compileall -q -s /image --invalidation-mode unchecked-hash /image/opt/delineate/lib \
 && find /image -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH}" {} +


FROM ${BASE}
ARG SOURCE_DATE_EPOCH=0
RUN touch /started && sleep 1 \
 && apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends python3 nginx \
 && groupadd --gid 10001 delineate \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin delineate \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* /etc/nginx \
        /usr/share/doc /usr/share/man /usr/share/locale \
 && find / -xdev -newer /started ! -path '/proc/*' ! -path '/sys/*' ! -path '/dev/*' \
        -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH}" {} + \
 && rm /started
COPY --from=build /image/ /

ENV PATH=/opt/delineate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DELINEATE_ENV=production \
    DELINEATE_HOME=/tmp/delineate
WORKDIR /app
USER 10001:10001
EXPOSE 80 443
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["delineate", "healthcheck"]
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
