"""The image as a team runs it: what is in it, who it runs as, how it starts, works, fails and ends."""

from __future__ import annotations

import json
import re
import time

import pytest

from delineate.seed import SAMPLES
from tests.image.app import App, AppMaker
from tests.image.conftest import ROOT, Image
from tests.image.docker import PAUSE_SECONDS, Docker, DockerError
from tests.image.standins import PASSWORD, S3Container
from tests.servers import SECRET_KEY, wait_until

MEGABYTE = 1_000_000
# What Debian publishes as trixie-slim, uncompressed; the base that a test run makes itself may be larger.
OFFICIAL_BASE_BYTES = 80 * MEGABYTE
LARGE = 80_001
SUPERVISOR = "unix:///tmp/delineate/run/supervisor.sock"


@pytest.fixture(scope="module")
def files(s3: S3Container) -> dict[int, bytes]:
    """Source files that are in the store: the samples, and one that takes several parts."""
    bodies = {sample.file_id: sample.body() for sample in SAMPLES} | {LARGE: bytes(range(256)) * 160_000}
    for file_id, body in bodies.items():
        s3.put_file(file_id, body)
    return bodies


def follow(app: App, job_id: str) -> list[str]:
    """The names of the events of a job's stream, until it ends."""
    answer = app.get(f"/v1/export/{job_id}/progress")
    assert answer.headers["content-type"] == "text/event-stream"
    return re.findall(r"^event: (\w+)$", answer.body.decode(), re.MULTILINE)


def run(engine: Docker, image: Image, *words: str, options: tuple[str, ...] = ()) -> str:
    return engine("run", "--rm", *options, image.tag, *words)


def shell(engine: Docker, image: Image, script: str) -> str:
    return engine("run", "--rm", "--entrypoint", "sh", image.tag, "-c", script)


def test_whole_story_through_nginx(app: App, files: dict[int, bytes]) -> None:
    job_id = app.export([70000, 70003, 70004, LARGE])
    assert follow(app, job_id)[-1] == "completed"
    assert list(app.archive(job_id).values()) == [files[file_id] for file_id in (70000, 70003, 70004, LARGE)]
    page = app.get("/", headers={"Accept": "text/html"})
    assert b"<title>delineate</title>" in page.body
    health = app.get("/health").json()
    assert health == {"status": "healthy", "checks": {"storage": "ok", "redis": "ok", "workers": "ok"}}


def test_metrics_are_inside_only(app: App) -> None:
    assert b"http_requests_total" in app.get_internal("/metrics").body
    assert app.get_internal("/nginx_status").status == 200
    assert app.get("/metrics").status == 404


def test_everything_runs_as_nobody_special(app: App) -> None:
    script = 'for d in /proc/[0-9]*; do echo "$(stat -c %u $d) $(tr "\\0" " " < $d/cmdline)"; done'
    processes = [line.split(" ", 1) for line in app.exec("sh", "-c", script).splitlines() if line.strip()]
    assert {uid for uid, command in processes if command.strip()} == {"10001"}
    commands = " ".join(command for _, command in processes)
    for program in ("supervisord", "nginx: master", "delineate api", "delineate worker"):
        assert program in commands
    first = app.exec("sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline")
    assert "-m delineate.supervisord --configuration /app/supervisord.conf" in first


def test_no_secret_is_in_a_command_line_or_log(app: App) -> None:
    commands = app.exec("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    for secret in (PASSWORD, SECRET_KEY):
        assert secret not in commands
        assert secret not in app.logs()
    assert "X-Amz-Signature" not in app.logs()


def test_works_without_capabilities_or_new_privileges(make_app: AppMaker, files: dict[int, bytes]) -> None:
    app = make_app("--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    assert list(app.archive(app.completed(app.export([70001]))["jobId"]).values()) == [files[70001]]


def test_first_process_reaps_orphans(app: App) -> None:
    app.exec("sh", "-c", "(sleep 0.2 &) ; true")

    def reaped() -> bool:
        states = app.exec("sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null").splitlines()
        return not any(") Z " in line for line in states)

    wait_until(reaped, "the end of all zombies")
    assert "reaped" not in app.logs()


def in_the_middle_of_a_job(make_app: AppMaker, delay: int) -> tuple[App, str]:
    """An app that has begun a job of several parts, which takes `delay` seconds besides."""
    slow = {f"DELINEATE__PROCESSING__SIMULATED_DELAY__{bound}": str(delay) for bound in ("MIN", "MAX")}
    app = make_app(env={"DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED": "true", **slow})
    job_id = app.export([70005, LARGE])
    app.wait_until(lambda: app.get(f"/v1/export/{job_id}").json()["status"] == "processing", "the job's start")
    return app, job_id


def starts_again_and_finishes(app: App, job_id: str, files: dict[int, bytes]) -> None:
    app.start()
    app.wait_healthy()
    assert app.completed(job_id)["attempts"] == 1
    assert list(app.archive(job_id).values()) == [files[70005], files[LARGE]]


def test_stop_in_the_middle_of_a_job_and_start_again(make_app: AppMaker, files: dict[int, bytes]) -> None:
    app, job_id = in_the_middle_of_a_job(make_app, 8)
    started = time.monotonic()
    app.stop(seconds=10)
    assert time.monotonic() - started < 10, "the container was killed"
    assert app.exit_code == 0
    assert "draining" in app.logs()
    starts_again_and_finishes(app, job_id, files)


def test_kill_in_the_middle_of_a_job_and_start_again(make_app: AppMaker, files: dict[int, bytes]) -> None:
    app, job_id = in_the_middle_of_a_job(make_app, 3)
    app.kill()
    starts_again_and_finishes(app, job_id, files)


def test_jobs_of_one_container_are_finished_by_another(make_app: AppMaker, files: dict[int, bytes]) -> None:
    first = make_app(env={"DELINEATE__WORKER__CONCURRENCY": "1", "DELINEATE_WORKER_PROCESSES": "1"})
    second = make_app()
    jobs = [first.export([70000 + number]) for number in range(8)]
    first.exec("delineate", "restart", "api")  # an operator's command inside, while jobs run
    for number, job_id in enumerate(jobs):
        second.completed(job_id)
        assert list(second.archive(job_id).values()) == [files[70000 + number]]


def test_a_program_that_does_not_stay_up_ends_the_container(make_app: AppMaker) -> None:
    app = make_app(env={"DELINEATE__STORAGE__SECRET_ACCESS_KEY": "wrong-secret"}, healthy=False)
    assert app.wait(120) == 1
    assert "did not stay up; everything stops" in app.logs()
    assert "refused access" in app.logs()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"DELINEATE__QUEUE__ATTEMPTS": "none"}, "queue.attempts"),
        ({"DELINEATE__NGINX__CERTIFICATE": "/app/LICENSE"}, "nginx.certificate_key"),
        ({"DELINEATE_WORKER_PROCESSES": "many"}, "DELINEATE_WORKER_PROCESSES"),
        (
            {"DELINEATE__REDIS__PASSWORD": None, "DELINEATE__REDIS__PASSWORD_FILE": "/run/none"},
            "/run/none",
        ),
    ],
)
def test_bad_settings_are_one_line(make_app: AppMaker, environ: dict[str, str | None], words: str) -> None:
    app = make_app(env=environ, healthy=False)
    assert app.wait() == 2
    assert app.logs().count("\n") == 1
    assert words in app.logs()


def test_read_only_without_tmp_is_one_line(engine: Docker, image: Image) -> None:
    with pytest.raises(DockerError) as caught:
        run(engine, image, options=("--read-only",))
    assert "/tmp/delineate cannot be used: Read-only file system" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_health_follows_the_processes_and_not_redis(make_app: AppMaker) -> None:
    app = make_app()
    assert app.exec("delineate", "healthcheck").strip() == "healthy"
    app.docker("pause", make_app.redis.name)
    try:
        wait_until(lambda: app.get("/health").status == 503, "an unhealthy service")
        assert app.exec("delineate", "healthcheck").strip() == "healthy"
    finally:
        app.docker("unpause", make_app.redis.name)
    app.exec("supervisorctl", "-c", "/app/supervisord.conf", "-s", SUPERVISOR, "stop", "worker:worker_01")
    with pytest.raises(DockerError):
        app.exec("delineate", "healthcheck")


def test_edge_spreads_requests_and_survives_one_container(make_app: AppMaker, files: dict[int, bytes]) -> None:
    inside = {"DELINEATE__NGINX__TRUSTED_PROXIES": "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"}
    apps = [make_app("--network-alias", "fleet", env=inside) for _ in range(2)]
    edge = make_app(command=("edge",), env={"DELINEATE__NGINX__UPSTREAM": "fleet:80"})
    for _ in range(20):
        assert edge.get("/v1/exports").status == 200

    def seen() -> list[int]:
        return [len(re.findall(r'"GET /v1/exports 200"', app.logs())) for app in apps]

    # A line is written after its answer was sent.
    wait_until(lambda: sum(seen()) >= 20, "the line of every request", pause=PAUSE_SECONDS)
    assert sum(seen()) == 20
    assert min(seen()) >= 5
    apps[0].kill()
    assert [edge.get("/v1/exports").status for _ in range(20)] == [200] * 20
    job_id = edge.export([70002])
    assert follow(edge, job_id)[-1] == "completed"
    assert list(edge.archive(job_id).values()) == [files[70002]]
    edge.kill("QUIT")
    assert edge.wait() == 0


def test_image_is_small_and_has_nothing_that_it_does_not_need(engine: Docker, image: Image) -> None:
    size = int(engine("image", "inspect", "--format", "{{.Size}}", image.tag))
    base = int(engine("image", "inspect", "--format", "{{.Size}}", "debian:trixie-slim"))
    assert size - base + OFFICIAL_BASE_BYTES < 250 * MEGABYTE
    tools = shell(engine, image, "for p in gcc cc make git pip curl wget; do command -v $p; done; true")
    assert tools == ""
    assert set(shell(engine, image, "ls -A /app").split()) == {"LICENSE", "conf", "nginx.conf", "supervisord.conf"}
    script = r"find / -xdev \( -name .git -o -name .env -o -name '*.key' \) 2>/dev/null; true"
    assert shell(engine, image, script) == ""


def test_image_says_what_it_is(engine: Docker, image: Image) -> None:
    config = json.loads(engine("image", "inspect", "--format", "{{json .Config}}", image.tag))
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "delineate", "healthcheck"]
    assert set(config["ExposedPorts"]) == {"80/tcp", "443/tcp"}
    assert config["Labels"]["org.opencontainers.image.licenses"] == "MIT"
    assert not [line for line in config["Env"] if re.search("PASSWORD|SECRET|TOKEN", line)]
    assert run(engine, image, "--version").startswith("delineate ")


def test_packages_are_those_of_the_lock_file(engine: Docker, image: Image) -> None:
    lines = re.findall(r"^([\w.-]+)==([^ ;\\]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    locked = {name.lower().replace("_", "-"): version for name, version in lines}
    script = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    installed = json.loads(engine("run", "--rm", "--entrypoint", "/opt/delineate/bin/python", image.tag, "-c", script))
    installed = {name.lower().replace("_", "-"): version for name, version in installed.items()}
    assert installed.pop("delineate")
    assert installed.items() <= locked.items()
