"""What callers get: how many ask, how fast they are answered, who is refused, who watches."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.models.common import StackingMode

from dashboards.panels import (
    NONE,
    QUANTILE_COLORS,
    About,
    Column,
    Limits,
    Query,
    columns,
    dashboard,
    heat,
    lines,
    number,
    quantiles,
    row,
    variable,
)

# What users ask for; /health answers 503 by design, and machines ask for it all the time.
API = 'path=~"/v1/.+"'
# An answer that is late on purpose is not slow: this one waits for its job.
PROMPT = f'{API}, path!="/v1/download/start"'
LATENCY = Limits.at_most(0.5, 1)
SHARE = Limits.at_most(0.001, 0.01)


def build() -> Dashboard:
    board = dashboard(
        "delineate-api",
        "API Overview",
        "What callers get: how many ask, how fast they are answered, who is refused, who watches.",
        variable("instance", "Container", "delineate_build_info"),
    )
    _now(board)
    _requests(board)
    _streams(board)
    _refusals(board)
    return board


def _now(board: Dashboard) -> None:
    board.with_row(row("Now"))
    board.with_panel(
        number(
            "Request rate",
            About(
                "Requests to /v1 answered in a minute, by all API processes.",
                "what your callers do; each polling client alone makes 30 to 60.",
                "a sudden zero means that nothing arrives: look at nginx and at the targets in Infrastructure.",
            ),
            Query(f'60 * sum(rate(http_requests_total{{instance=~"$instance", {API}}}[$__rate_interval]))', "requests"),
            unit="reqpm",
            limits=NONE,
        )
    )
    board.with_panel(
        number(
            "Error rate",
            About(
                "Share of requests to /v1 that were answered with a status of 500 or above.",
                "under 0.1 %.",
                "503 means that Redis or the store is away (Dependencies in Infrastructure), 504 that it is slow, 500 "
                "is a bug: click for the lines of the log.",
            ),
            Query(
                f'sum(rate(http_requests_total{{instance=~"$instance", {API}, status=~"5.."}}[$__rate_interval]))'
                f' / (sum(rate(http_requests_total{{instance=~"$instance", {API}}}[$__rate_interval])) > 0)',
                "errors",
            ),
            unit="percentunit",
            limits=SHARE,
            missing="no requests",
        )
    )
    board.with_panel(
        number(
            "p99 latency",
            About(
                "99 of 100 requests to /v1 were answered within this time. Without /v1/download/start, which waits "
                "for its job.",
                "under 500 ms.",
                "see which route it is below, then the latency of Redis and of the store in Infrastructure.",
            ),
            Query(
                "histogram_quantile(0.99, sum by (le) (rate(http_request_duration_seconds_bucket"
                f'{{instance=~"$instance", {PROMPT}}}[$__rate_interval])))',
                "p99",
            ),
            unit="s",
            limits=LATENCY,
            missing="no requests",
        )
    )
    board.with_panel(
        number(
            "Open streams",
            About(
                "Event streams that are open now: people who watch a job.",
                "rises and falls with the jobs; each is one file descriptor.",
                "many streams and no jobs: clients that reconnect without end; see why streams end, below.",
            ),
            Query('sum(active_sse_connections{instance=~"$instance"})', "streams"),
            unit="short",
            limits=NONE,
        )
    )
    board.with_panel(
        number(
            "Rate-limited",
            About(
                "Requests refused in a minute with 429 because their caller had sent too many.",
                "zero, or one client that polls too fast.",
                "many callers at once: the limit is too low, or all come through one proxy whose X-Forwarded-For is "
                "not trusted (nginx.trusted_proxies).",
            ),
            Query('60 * sum(rate(rate_limited_requests_total{instance=~"$instance"}[$__rate_interval]))', "refused"),
            unit="reqpm",
            limits=Limits.at_most(1, 60),
        )
    )
    board.with_panel(
        number(
            "Links not ready",
            About(
                "Share of download links that were asked for too early or too late, in the time shown.",
                "under 20 %: clients ask when the job has completed.",
                "not_ready: clients poll for the link instead of the job. expired: they come after retention.job.",
            ),
            Query(
                'sum(increase(download_links_total{instance=~"$instance", status!="ready"}[$__range]))'
                ' / (sum(increase(download_links_total{instance=~"$instance"}[$__range])) > 0)',
                "not ready",
            ),
            unit="percentunit",
            limits=Limits.at_most(0.2, 0.5),
            missing="no links",
        )
    )


def _requests(board: Dashboard) -> None:
    board.with_row(row("Requests"))
    board.with_panel(
        lines(
            "Requests by status",
            About(
                "Requests answered in a minute, by status. 499: the client left before its answer.",
                "nearly all 200; 204 and 304 are polls that found nothing new.",
                "5xx is ours, 4xx the callers'. Which route it is stands in the table below.",
            ),
            Query(
                '60 * (sum by (status) (rate(http_requests_total{instance=~"$instance"}[$__rate_interval])) > 0)',
                "{{status}}",
            ),
            unit="reqpm",
            stacked=StackingMode.NORMAL,
            colors={
                "200": "green",
                "202": "light-green",
                "204": "semi-dark-green",
                "304": "dark-green",
                "404": "light-blue",
                "409": "blue",
                "429": "yellow",
                "499": "purple",
                "500": "dark-red",
                "503": "red",
                "504": "orange",
            },
        )
    )
    board.with_panel(
        lines(
            "Latency",
            About(
                "Time from the last byte of a request to /v1 to its answer; for streams to the first event. Without "
                "/v1/download/start, which waits for its job.",
                "p50 of a few milliseconds, p99 below the yellow line (500 ms).",
                "all three up: the processes are out of CPU. p99 alone: Redis or the store answers slowly at times.",
            ),
            *quantiles("http_request_duration_seconds", PROMPT),
            unit="s",
            limits=LATENCY,
            colors=QUANTILE_COLORS,
        )
    )
    board.with_panel(
        heat(
            "Request duration",
            About(
                "How many requests to /v1 took how long; each row is a bucket, the colour how many are in it.",
                "one bright band of a few milliseconds.",
                "a second band is a second kind of request: one that waits for Redis, for the store, or for a "
                "time-out.",
            ),
            "sum by (le)"
            f' (increase(http_request_duration_seconds_bucket{{instance=~"$instance", {PROMPT}}}[$__rate_interval]))',
            unit="s",
        )
    )
    board.with_panel(
        lines(
            "Errors by route",
            About(
                "Requests a minute that were answered with a status of 500 or above.",
                "nothing.",
                "one route: a bug or what that route alone needs. All routes: Redis or the store.",
            ),
            Query(
                "60 * sum by (method, path, status)"
                ' (rate(http_requests_total{instance=~"$instance", status=~"5.."}[$__rate_interval])) > 0',
                "{{status}} {{method}} {{path}}",
            ),
            unit="reqpm",
        )
    )
    board.with_panel(
        columns(
            "Routes",
            About(
                "Each route in the time shown: requests, share of errors, time. A route is a template: "
                "/v1/export/{jobId}.",
                "errors of 0 %, and a p99 under 500 ms; /v1/download/start takes as long as its job.",
                "click for the log lines; a line's traceId leads to what the request waited for.",
            ),
            ["method", "path"],
            Column(
                "Requests",
                'sum by (method, path) (increase(http_requests_total{instance=~"$instance"}[$__range])) > 0',
                "short",
            ),
            Column(
                "Errors",
                'sum by (method, path) (increase(http_requests_total{instance=~"$instance", status=~"5.."}[$__range]))'
                ' / (sum by (method, path) (increase(http_requests_total{instance=~"$instance"}[$__range])) > 0)',
                "percentunit",
                SHARE,
            ),
            *(
                Column(
                    f"p{share}",
                    f"histogram_quantile({share / 100}, sum by (le, method, path)"
                    ' (increase(http_request_duration_seconds_bucket{instance=~"$instance"}[$__range]))) >= 0',
                    "s",
                    LATENCY,
                )
                for share in (50, 95, 99)
            ),
        )
    )


def _streams(board: Dashboard) -> None:
    board.with_row(row("Event streams"))
    board.with_panel(
        lines(
            "Streams by container",
            About(
                "Open event streams of each container.",
                "about the same in all containers.",
                "one has all: nginx sees no other (Targets in Infrastructure). None has any while jobs run: clients "
                "poll, or a proxy cuts their streams.",
            ),
            Query('sum by (instance) (active_sse_connections{instance=~"$instance"})', "{{instance}}"),
            unit="short",
            width=8,
        )
    )
    board.with_panel(
        lines(
            "Events sent",
            About(
                "Events sent on streams in a second, without heartbeats.",
                "several progress events for each job that runs, one event at its end.",
                "open streams and running jobs, and no events: the API has lost its subscription in Redis; look for "
                "'progress events' in the log.",
            ),
            Query('sum by (event) (rate(sse_events_total{instance=~"$instance"}[$__rate_interval]))', "{{event}}"),
            unit="cps",
            colors={"completed": "green", "failed": "red", "cancelled": "purple", "progress": "blue"},
            width=8,
            logs='{service="app"} |= "progress events"',
        )
    )
    board.with_panel(
        lines(
            "Why streams end",
            About(
                "Event streams that ended in a minute, by reason.",
                "job_ended. max_duration after ten minutes and drain at a deployment are clean: clients reconnect.",
                "client_gone at a steady age: a proxy cuts streams. slow_reader: clients that do not read are dropped.",
            ),
            Query(
                '60 * sum by (reason) (rate(sse_streams_ended_total{instance=~"$instance"}[$__rate_interval]))',
                "{{reason}}",
            ),
            unit="opm",
            colors={"job_ended": "green", "slow_reader": "red", "client_gone": "yellow"},
            width=8,
        )
    )


def _refusals(board: Dashboard) -> None:
    board.with_row(row("Refusals and links"))
    board.with_panel(
        lines(
            "Refusals",
            About(
                "Requests to /v1 refused in a minute: 429 too many of a caller, 503 no Redis, no store or a full line.",
                "nothing, but for a client that polls too fast.",
                "503 with all dependencies up: the line is full (queue.max_waiting); see Download Jobs.",
            ),
            Query(
                '60 * sum(rate(rate_limited_requests_total{instance=~"$instance"}[$__rate_interval]))',
                "429 rate limit",
            ),
            Query(
                f'60 * sum(rate(http_requests_total{{instance=~"$instance", {API}, status="503"}}[$__rate_interval]))',
                "503 away or full",
            ),
            unit="reqpm",
            colors={"429 rate limit": "yellow", "503 away or full": "red"},
        )
    )
    board.with_panel(
        lines(
            "Download links",
            About(
                "Links asked for in a minute, by outcome.",
                "ready.",
                "not_ready: clients ask before the job has completed. expired: they ask after its time.",
            ),
            Query(
                '60 * sum by (status) (rate(download_links_total{instance=~"$instance"}[$__rate_interval]))',
                "{{status}}",
            ),
            unit="reqpm",
            colors={"ready": "green", "not_ready": "yellow", "expired": "red"},
        )
    )
