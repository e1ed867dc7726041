"""What becomes of jobs: how long they wait, how long they take, why they fail, and what is recovered."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.models.common import StackingMode

from dashboards.panels import (
    NONE,
    QUANTILE_COLORS,
    About,
    Limits,
    Query,
    bars,
    dashboard,
    heat,
    lines,
    number,
    quantiles,
    row,
    state,
    variable,
)

WORKERS = '{service="app", level=~"warning|error|critical"} |= "delineate-worker"'
FAILURES = '{service="app"} |~ "attempt failed|job failed"'
CRASHES = '{service="app"} |= "a worker was lost"'
# As long as a user would wait in front of it, as long as one would come back for, and longer than that.
TIERS = {"fast": "green", "medium": "yellow", "slow": "red"}
PROCESSING = Limits.at_most(15, 60)
WAITING = Limits.at_most(30, 300)
SUCCESS = Limits.at_least(0.95, 0.99)


def build() -> Dashboard:
    board = dashboard(
        "delineate-jobs",
        "Download Jobs",
        "What becomes of jobs: how long they wait, how long they take, why they fail, and what is recovered.",
        variable("instance", "Container", "delineate_build_info"),
    )
    _now(board)
    _line(board)
    _processing(board)
    _failures(board)
    _bytes(board)
    return board


def _now(board: Dashboard) -> None:
    board.with_row(row("Now"))
    board.with_panel(
        number(
            "Waiting jobs",
            About(
                "Jobs in line, on all machines together.",
                "as many as the workers take in half a minute.",
                "more workers (docs/scaling.md), if those there are are busy; if not, see whether the queue is paused "
                "or workers are missing.",
            ),
            Query('max(export_queue_size{instance=~"$instance", state="waiting"})', "waiting"),
            unit="short",
            limits=Limits.at_most(100, 5000),
        )
    )
    board.with_panel(
        number(
            "Oldest waiting",
            About(
                "Age of the job that has waited longest; 0 if none waits.",
                "under 30 s.",
                "rising in a straight line: nothing is taken at all. Workers live, then paused, then Redis.",
            ),
            Query('max(export_queue_oldest_seconds{instance=~"$instance"})', "oldest"),
            unit="s",
            limits=WAITING,
        )
    )
    board.with_panel(
        number(
            "Processing",
            About(
                "Jobs being packed now, by all workers.",
                "up to worker.concurrency (3) for each worker.",
                "at its most for long while jobs wait: more workers. Zero while jobs wait: they do not take any.",
            ),
            Query('sum(downloads_active{instance=~"$instance"})', "processing"),
            unit="short",
            limits=NONE,
        )
    )
    board.with_panel(
        number(
            "Success rate",
            About(
                "Share of jobs that completed, of those that completed or failed in the time shown. A job counts "
                "once, however many attempts it took; cancelled ones do not count.",
                "99 % and more.",
                "see below which class of error it is. not_found is the callers', everything else is yours.",
            ),
            Query(
                'sum(increase(export_jobs_total{instance=~"$instance", status="completed"}[$__range]))'
                ' / (sum(increase(export_jobs_total{instance=~"$instance",'
                ' status=~"completed|failed"}[$__range])) > 0)',
                "success",
            ),
            unit="percentunit",
            limits=SUCCESS,
            missing="no jobs",
            logs=FAILURES,
        )
    )
    board.with_panel(
        number(
            "Workers",
            About(
                "Workers with a heartbeat, on all machines.",
                "containers times DELINEATE_WORKER_PROCESSES.",
                "fewer: they crash (memory, in Infrastructure) or cannot reach Redis.",
            ),
            Query('max(workers_live{instance=~"$instance"})', "workers"),
            unit="short",
            limits=Limits.at_least(1, 2),
            logs=WORKERS,
        )
    )
    board.with_panel(
        state(
            "Queue",
            About(
                "Whether workers may take jobs.",
                "open.",
                "an operator holds it: `delineate queue resume` lets it go.",
            ),
            Query('max(export_queue_paused{instance=~"$instance"})', "queue"),
            {0: ("open", "green"), 1: ("paused", "orange")},
        )
    )


def _line(board: Dashboard) -> None:
    board.with_row(row("The line"))
    board.with_panel(
        lines(
            "Queue depth",
            About(
                "Jobs by state: waiting in line, active at a worker, delayed until their retry, failed (dead letters).",
                "waiting near zero, active up to three a worker, delayed and failed near zero.",
                "waiting rises: too few workers. delayed rises: something that all jobs need is away. failed rises: "
                "see Failures.",
            ),
            Query('max by (state) (export_queue_size{instance=~"$instance"})', "{{state}}"),
            unit="short",
            colors={"waiting": "yellow", "active": "blue", "delayed": "orange", "failed": "red"},
        )
    )
    board.with_panel(
        lines(
            "Oldest waiting job",
            About(
                "Age of the job that has waited longest.",
                "a saw with small teeth, under 30 s.",
                "one straight line up means that nothing is taken.",
            ),
            Query('max(export_queue_oldest_seconds{instance=~"$instance"})', "oldest"),
            unit="s",
            limits=WAITING,
        )
    )
    board.with_panel(
        lines(
            "Wait before the first attempt",
            About(
                "From joining the line to being taken by a worker, of jobs taken in that time.",
                "p50 well under a second, p99 below 30 s.",
                "more workers; a single caller cannot do it, since callers take turns.",
            ),
            *quantiles("export_job_wait_seconds"),
            unit="s",
            limits=WAITING,
            colors=QUANTILE_COLORS,
        )
    )
    board.with_panel(
        lines(
            "Jobs in and out",
            About(
                "Jobs a minute: taken for the first time, and ended, by how.",
                "taken and completed are nearly one line.",
                "taken without completed: they fail or run long. Neither, while jobs wait: workers.",
            ),
            Query('60 * sum(rate(export_job_wait_seconds_count{instance=~"$instance"}[$__rate_interval]))', "taken"),
            Query(
                '60 * sum by (status) (rate(export_jobs_total{instance=~"$instance"}[$__rate_interval]))', "{{status}}"
            ),
            unit="opm",
            colors={"taken": "blue", "completed": "green", "failed": "red", "cancelled": "purple"},
        )
    )


def _processing(board: Dashboard) -> None:
    board.with_row(row("Processing time: fast up to 15 s, medium up to 60 s, slow beyond"))
    board.with_panel(
        bars(
            "Processing time by tier",
            About(
                "Completed downloads in the time shown: fast up to 15 s, medium up to 60 s, slow beyond.",
                "most of them fast.",
                "slow ones are large, or the store is: compare bytes and S3 latency.",
            ),
            Query(
                "sum by (tier)"
                ' (increase(download_processing_seconds_count{instance=~"$instance", status="completed"}[$__range]))',
                "{{tier}}",
            ),
            unit="short",
            colors=TIERS,
            logs='{service="app"} |= "job completed"',
        )
    )
    board.with_panel(
        lines(
            "Tiers over time",
            About(
                "Completed downloads a minute by tier: fast up to 15 s, medium up to 60 s, slow beyond.",
                "green.",
                "turning yellow and red while the load is the same: the store or the network has become slow.",
            ),
            Query(
                "60 * sum by (tier)"
                ' (rate(download_processing_seconds_count{instance=~"$instance",'
                ' status="completed"}[$__rate_interval]))',
                "{{tier}}",
            ),
            unit="opm",
            stacked=StackingMode.NORMAL,
            colors=TIERS,
            width=16,
            logs='{service="app"} |= "job completed"',
        )
    )
    board.with_panel(
        lines(
            "Processing time",
            About(
                "Time of one attempt that completed. Behind it the tiers: green up to 15 s, yellow up to 60 s, red.",
                "p95 in the green.",
                "an attempt may take worker.job_timeout (180 s) at the most; what comes near it will fail.",
            ),
            *quantiles("download_processing_seconds", 'status="completed"'),
            unit="s",
            limits=PROCESSING,
            colors=QUANTILE_COLORS,
            width=8,
        )
    )
    board.with_panel(
        heat(
            "Processing time, all attempts",
            About(
                "How many attempts took how long, those too that failed; each row is a bucket.",
                "bright at the bottom.",
                "a band at worker.job_timeout (180 s) are attempts that hang and are ended.",
            ),
            'sum by (le) (increase(download_processing_seconds_bucket{instance=~"$instance"}[$__rate_interval]))',
            unit="s",
            width=8,
            logs=WORKERS,
        )
    )
    board.with_panel(
        lines(
            "Last claim to end, p95",
            About(
                "From a job's last claim to its end: 95 of 100 took no longer.",
                "failed is shorter than completed: what will fail, fails soon.",
                "failed at 180 s: attempts run into worker.job_timeout.",
            ),
            Query(
                "histogram_quantile(0.95, sum by (le, status)"
                ' (rate(export_job_duration_seconds_bucket{instance=~"$instance"}[$__rate_interval])))',
                "{{status}}",
            ),
            unit="s",
            limits=PROCESSING,
            colors={"completed": "green", "failed": "red"},
            width=8,
        )
    )


def _failures(board: Dashboard) -> None:
    board.with_row(row("Failures and recovery"))
    board.with_panel(
        number(
            "Dead letters",
            About(
                "Jobs that have failed for good and are kept for seven days (retention.failed).",
                "those whose files do not exist.",
                "`delineate jobs list --status failed` says why, `delineate jobs retry` gives them another chance.",
            ),
            Query('max(export_queue_size{instance=~"$instance", state="failed"})', "dead letters"),
            unit="short",
            limits=Limits.at_most(10, 1000),
            logs=FAILURES,
        ).height(8)
    )
    board.with_panel(
        number(
            "Crashes recovered",
            About(
                "Jobs taken from workers that were lost, in the time shown: requeued, or buried after "
                "queue.max_crashes.",
                "zero; a deployment hands its jobs back and loses none.",
                "buried: a poison job that kills its worker. requeued: workers are killed, mostly for their memory.",
            ),
            Query('sum(increase(export_crashes_recovered_total{instance=~"$instance"}[$__range]))', "recovered"),
            unit="short",
            limits=Limits.at_most(1, 10),
            logs=CRASHES,
        ).height(8)
    )
    board.with_panel(
        lines(
            "Failed attempts by class",
            About(
                "Attempts that failed in a minute, by class of error: retried, or final.",
                "not_found final, when callers ask for files that do not exist.",
                "timeout, network: the store. permission: its keys. internal: a bug, which is worth a report.",
            ),
            Query(
                "60 * sum by (error_class, outcome)"
                ' (rate(export_attempt_failures_total{instance=~"$instance"}[$__rate_interval])) > 0',
                "{{error_class}} {{outcome}}",
            ),
            unit="opm",
            width=8,
            logs=FAILURES,
        )
    )
    board.with_panel(
        lines(
            "Attempts by outcome",
            About(
                "Attempts that ended in a minute. dropped: cancelled or taken over. handed_back: its worker was "
                "stopped.",
                "completed; handed_back at a deployment.",
                "dropped without cancellations: workers lose their leases, because they or Redis do not answer in "
                "time.",
            ),
            Query(
                '60 * sum by (status) (rate(downloads_total{instance=~"$instance"}[$__rate_interval]))', "{{status}}"
            ),
            unit="opm",
            colors={"completed": "green", "failed": "red", "dropped": "purple", "handed_back": "blue"},
            width=8,
            logs=WORKERS,
        )
    )
    board.with_panel(
        lines(
            "Retries by class",
            About(
                "Attempts that failed and are tried again after a wait, in the time shown, by class of error.",
                "a few.",
                "retries that help show as completed jobs beside them; see Success rate.",
            ),
            Query(
                "sum by (error_class)"
                ' (increase(export_attempt_failures_total{instance=~"$instance", '
                'outcome="retried"}[$__rate_interval]))',
                "{{error_class}}",
            ),
            unit="short",
            width=12,
            logs='{service="app"} |= "attempt failed"',
        )
    )
    board.with_panel(
        lines(
            "Crash recoveries",
            About(
                "Jobs taken from lost workers: requeued, or buried as poison after queue.max_crashes.",
                "nothing.",
                "see Memory and Processes' age in Infrastructure for who was killed.",
            ),
            Query(
                'sum by (outcome) (increase(export_crashes_recovered_total{instance=~"$instance"}[$__rate_interval]))',
                "{{outcome}}",
            ),
            unit="short",
            colors={"requeued": "yellow", "buried": "red"},
            width=12,
            logs=CRASHES,
        )
    )


def _bytes(board: Dashboard) -> None:
    board.with_row(row("Bytes"))
    board.with_panel(
        lines(
            "Bytes in and out",
            About(
                "Bytes of source files read, and of archives written, in a second.",
                "nearly the same: files are stored, not packed tightly.",
                "reads without writes: attempts that fail after they have read. Both at a ceiling: the network's, or "
                "the store's.",
            ),
            Query('sum(rate(source_bytes_read_total{instance=~"$instance"}[$__rate_interval]))', "read"),
            Query('sum(rate(archive_bytes_written_total{instance=~"$instance"}[$__rate_interval]))', "written"),
            unit="Bps",
            colors={"read": "blue", "written": "green"},
            logs=WORKERS,
        )
    )
    board.with_panel(
        lines(
            "Parts of archives",
            About(
                "Parts a minute: uploaded, and resumed, which were there already from an attempt before.",
                "uploaded.",
                "resumed is work that a crash or a retry did not cost.",
            ),
            Query(
                '60 * sum by (outcome) (rate(archive_parts_total{instance=~"$instance"}[$__rate_interval]))',
                "{{outcome}}",
            ),
            unit="opm",
            colors={"uploaded": "green", "resumed": "blue"},
            logs='{service="app"} |= "continuing an upload"',
        )
    )
