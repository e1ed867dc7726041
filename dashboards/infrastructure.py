"""What all of it runs on: hosts, processes, nginx, Redis, the S3 store, and whether each of them is there."""

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
    lines,
    number,
    quantiles,
    row,
    states,
    variable,
)

SHARE_IN_USE = Limits.at_most(0.8, 0.9)
S3_LOGS = '{service=~"s3|minio"}'
REDIS_LOGS = '{service="redis"}'
NGINX_LOGS = '{service="nginx"}'
UP = {0: ("down", "red"), 1: ("up", "green")}
# Disks, not what is made of them or of memory; file systems that hold data.
DISK = 'device!~"(loop|ram|zram|dm-|md).*"'
FILES = 'fstype!~"tmpfs|ramfs|squashfs|overlay|nsfs|iso9660"'


def build() -> Dashboard:
    board = dashboard(
        "delineate-infrastructure",
        "Infrastructure",
        "What all of it runs on: hosts, processes, nginx, Redis, the S3 store, and whether each of them is there.",
        variable("node", "Host", "node_uname_info"),
        variable("instance", "Container", "delineate_build_info"),
    )
    _now(board)
    _there(board)
    _hosts(board)
    _processes(board)
    _redis(board)
    _store(board)
    _nginx_and_traces(board)
    return board


def _now(board: Dashboard) -> None:
    board.with_row(row("Now"))
    board.with_panel(
        number(
            "CPU usage",
            About(
                "Share of all hosts' CPU time that is not idle.",
                "under 80 %.",
                "see which process it is below; a container's own limit (DELINEATE_APP_CPUS) may be reached before.",
            ),
            Query('1 - avg(rate(node_cpu_seconds_total{instance=~"$node", mode="idle"}[$__rate_interval]))', "busy"),
            unit="percentunit",
            limits=SHARE_IN_USE,
        )
    )
    board.with_panel(
        number(
            "Memory usage",
            About(
                "Memory of all hosts that is in use, without what the kernel gives back when asked.",
                "under 80 % of what there is (Memory of hosts).",
                "see which process it is below; the kernel kills the largest when none is left.",
            ),
            Query(
                'sum(node_memory_MemTotal_bytes{instance=~"$node"} -'
                ' node_memory_MemAvailable_bytes{instance=~"$node"})',
                "used",
            ),
            unit="bytes",
            limits=NONE,
        )
    )
    board.with_panel(
        number(
            "Disk I/O",
            About(
                "Bytes that all hosts' disks read and write in a second.",
                "the store's and Redis' writes, and little else; the service keeps no files.",
                "a disk at its ceiling makes the store slow: compare S3 latency.",
            ),
            Query(
                f'sum(rate(node_disk_read_bytes_total{{instance=~"$node", {DISK}}}[$__rate_interval]))'
                f' + sum(rate(node_disk_written_bytes_total{{instance=~"$node", {DISK}}}[$__rate_interval]))',
                "read and written",
            ),
            unit="Bps",
            limits=NONE,
        )
    )
    board.with_panel(
        number(
            "Dependencies up",
            About(
                "How many of storage, redis and workers pass the check of /health, as the container sees it that sees "
                "least.",
                "3.",
                "the strips below say which; without redis or storage the API answers 503.",
            ),
            Query('min(sum by (instance) (dependency_up{instance=~"$instance"}))', "of 3"),
            unit="short",
            limits=Limits.at_least(2, 3),
        )
    )
    board.with_panel(
        number(
            "Workers live",
            About(
                "Workers with a heartbeat, on all machines.",
                "containers times DELINEATE_WORKER_PROCESSES.",
                "fewer: they crash, or do not reach Redis.",
            ),
            Query('max(workers_live{instance=~"$instance"})', "workers"),
            unit="short",
            limits=Limits.at_least(1, 2),
        )
    )
    board.with_panel(
        number(
            "Targets down",
            About(
                "Programs that Prometheus asks for numbers and gets none from.",
                "0.",
                "see which in Targets; until it is back, its panels are empty or show what others have.",
            ),
            Query("count(up == 0) or vector(0)", "down"),
            unit="short",
            limits=Limits.at_most(1, 2),
        )
    )


def _there(board: Dashboard) -> None:
    board.with_row(row("What is there"))
    board.with_panel(
        states(
            "Dependencies",
            About(
                "Whether the service reaches what it needs: the same checks as /health.",
                "green throughout.",
                "storage: S3 below and its log. redis: Redis below and its log. workers: none has a heartbeat.",
            ),
            Query('min by (dependency) (dependency_up{instance=~"$instance"})', "{{dependency}}"),
            UP,
            width=8,
        )
    )
    board.with_panel(
        states(
            "Targets",
            About(
                "Whether Prometheus gets numbers from each program.",
                "green throughout; a container that was replaced ends, and another begins.",
                "a red one does not run or does not answer within 10 s: see its container's log.",
            ),
            Query("min by (job, instance) (up)", "{{job}} {{instance}}"),
            UP,
            width=8,
        )
    )
    board.with_panel(
        columns(
            "Versions",
            About(
                "Containers by the version that they run.",
                "one row.",
                "two rows: a deployment is half done, or was rolled back in part.",
            ),
            ["version", "python"],
            Column(
                "Containers",
                'count by (version, python) (delineate_build_info{instance=~"$instance"})',
                "short",
            ),
            width=8,
            height=8,
        )
    )


def _hosts(board: Dashboard) -> None:
    board.with_row(row("Hosts"))
    board.with_panel(
        lines(
            "CPU of hosts",
            About(
                "Share of each host's CPU time that is not idle.",
                "under 80 %.",
                "see which process it is below; more hosts or fewer processes.",
            ),
            Query(
                '1 - avg by (instance) (rate(node_cpu_seconds_total{instance=~"$node",'
                ' mode="idle"}[$__rate_interval]))',
                "{{instance}}",
            ),
            unit="percentunit",
            limits=SHARE_IN_USE,
            width=8,
        )
    )
    board.with_panel(
        lines(
            "Memory of hosts",
            About(
                "Memory in use, without what the kernel gives back when asked, and what there is.",
                "used stays well under total.",
                "close to it: the kernel will kill processes, mostly the largest.",
            ),
            Query(
                'node_memory_MemTotal_bytes{instance=~"$node"} - node_memory_MemAvailable_bytes{instance=~"$node"}',
                "{{instance}} used",
            ),
            Query('node_memory_MemTotal_bytes{instance=~"$node"}', "{{instance}} total"),
            unit="bytes",
            width=8,
        )
    )
    board.with_panel(
        lines(
            "Disk I/O of hosts",
            About(
                "Bytes that each host's disks read and write in a second.",
                "follows the bytes in and out of the jobs, where the store is on that host.",
                "a flat line at the top is the disk's ceiling: a faster one, or a store on more hosts.",
            ),
            Query(
                f'sum by (instance) (rate(node_disk_read_bytes_total{{instance=~"$node", {DISK}}}[$__rate_interval]))',
                "{{instance}} read",
            ),
            Query(
                "sum by (instance)"
                f' (rate(node_disk_written_bytes_total{{instance=~"$node", {DISK}}}[$__rate_interval]))',
                "{{instance}} written",
            ),
            unit="Bps",
            width=8,
        )
    )
    board.with_panel(
        lines(
            "Disk busy",
            About(
                "Share of the time in which a disk had something to do, of each host's busiest disk.",
                "under 60 %.",
                "near 100 %: whoever waits for it, waits longer; the store's latency rises with it.",
            ),
            Query(
                "max by (instance)"
                f' (rate(node_disk_io_time_seconds_total{{instance=~"$node", {DISK}}}[$__rate_interval]))',
                "{{instance}}",
            ),
            unit="percentunit",
            limits=SHARE_IN_USE,
            width=8,
        )
    )
    board.with_panel(
        lines(
            "Disk space in use",
            About(
                "Share of each file system that is in use, as a plain user sees it.",
                "under 80 %; archives go after archive_days.",
                "above 90 % the store and Redis are about to refuse writes: more disk, or fewer days.",
            ),
            Query(
                "1 - min by (instance, device)"
                f' (node_filesystem_avail_bytes{{instance=~"$node", {FILES}}}'
                f' / node_filesystem_size_bytes{{instance=~"$node", {FILES}}})',
                "{{instance}} {{device}}",
            ),
            unit="percentunit",
            limits=SHARE_IN_USE,
            width=8,
        )
    )
    board.with_panel(
        lines(
            "Network of hosts",
            About(
                "Bytes that each host receives and sends in a second, loopback left out.",
                "three times the bytes of the jobs: from the store, back to it, and out to the caller.",
                "flat at the top: the network's ceiling.",
            ),
            Query(
                "sum by (instance)"
                ' (rate(node_network_receive_bytes_total{instance=~"$node", device!="lo"}[$__rate_interval]))',
                "{{instance}} received",
            ),
            Query(
                "sum by (instance)"
                ' (rate(node_network_transmit_bytes_total{instance=~"$node", device!="lo"}[$__rate_interval]))',
                "{{instance}} sent",
            ),
            unit="Bps",
            width=8,
        )
    )


def _processes(board: Dashboard) -> None:
    board.with_row(row("Processes of the service"))
    for title, about, unit, expr, limits in (
        (
            "CPU by process",
            About(
                "Share of one core that each process uses.",
                "API processes far below 1; workers near 1 while they pack.",
                "an API process at 1 makes every request wait: more of them (DELINEATE_API_PROCESSES).",
            ),
            "percentunit",
            'rate(process_cpu_seconds_total{instance=~"$instance", role!=""}[$__rate_interval])',
            Limits.at_most(0.9, 1),
        ),
        (
            "Memory by process",
            About(
                "Resident memory of each process.",
                "a worker needs archive.slots parts for each of its jobs: under 200 MB; an API process under 100 MB.",
                "all of a container together must fit its limit (DELINEATE_APP_MEMORY), or the kernel kills one.",
            ),
            "bytes",
            'process_resident_memory_bytes{instance=~"$instance", role!=""}',
            NONE,
        ),
        (
            "File descriptors by process",
            About(
                "Open file descriptors, as a share of what the process may open.",
                "under 50 %; each stream, each connection is one.",
                "at 100 % it accepts nobody: more API processes, or a higher limit of open files.",
            ),
            "percentunit",
            'process_open_fds{instance=~"$instance", role!=""} / process_max_fds{instance=~"$instance", role!=""}',
            Limits.at_most(0.5, 0.8),
        ),
    ):
        board.with_panel(lines(title, about, Query(expr, "{{role}} {{pid}}"), unit=unit, limits=limits, width=8))
    board.with_panel(
        lines(
            "Disk I/O by process",
            About(
                "Bytes that the service's processes had the disk read and write in a second; not shown where the "
                "kernel does not tell.",
                "nothing, or some kB where the files that hold the metrics are not in memory.",
                "something writes: a log in a file, or memory that is swapped out.",
            ),
            Query(
                "sum by (role)"
                ' (rate(process_disk_read_bytes_total{instance=~"$instance", role!=""}[$__rate_interval]))',
                "{{role}} read",
            ),
            Query(
                "sum by (role)"
                ' (rate(process_disk_written_bytes_total{instance=~"$instance", role!=""}[$__rate_interval]))',
                "{{role}} written",
            ),
            unit="Bps",
            width=8,
        )
    )
    board.with_panel(
        lines(
            "Processes by role",
            About(
                "How many API and worker processes there are.",
                "a level line.",
                "dents: processes end and are started again; their log says why. Lower for long: they do not stay up.",
            ),
            Query('count by (role) (process_start_time_seconds{instance=~"$instance", role!=""})', "{{role}}"),
            unit="short",
            colors={"api": "blue", "worker": "green"},
            width=8,
        )
    )
    board.with_panel(
        lines(
            "Age of the youngest process",
            About(
                "Seconds since the newest process of each role was started.",
                "rises with time; back to 0 at a deployment.",
                "never gets far: processes crash or are killed. Beside it: Memory by process.",
            ),
            Query('time() - max by (role) (process_start_time_seconds{instance=~"$instance", role!=""})', "{{role}}"),
            unit="s",
            colors={"api": "blue", "worker": "green"},
            width=8,
        )
    )


def _redis(board: Dashboard) -> None:
    board.with_row(row("Redis"))
    board.with_panel(
        lines(
            "Redis latency",
            About(
                "From a command to its reply or to giving up, as our processes see it: 99 of 100 took no longer. wait "
                "is left out, which is slow on purpose.",
                "script and command of a few milliseconds; connect only at starts.",
                "all: Redis is out of CPU, or its disk is slow (appendfsync). connect: connections do not stay.",
            ),
            Query(
                "histogram_quantile(0.99, sum by (le, kind)"
                ' (rate(redis_operation_duration_seconds_bucket{instance=~"$instance",'
                ' kind!="wait"}[$__rate_interval])))',
                "{{kind}}",
            ),
            unit="s",
            limits=Limits.at_most(0.05, 0.5),
            width=8,
            logs=REDIS_LOGS,
        )
    )
    board.with_panel(
        lines(
            "Redis operations",
            About(
                "Operations of our processes in a second, by kind: transitions of jobs (script), the rest (command), "
                "workers that wait for a job, new connections.",
                "wait and command even without load; connect near zero.",
                "connect rises: something cuts connections between us and Redis.",
            ),
            Query(
                'sum by (kind) (rate(redis_operation_duration_seconds_count{instance=~"$instance"}[$__rate_interval]))',
                "{{kind}}",
            ),
            unit="ops",
            width=8,
            logs=REDIS_LOGS,
        )
    )
    board.with_panel(
        lines(
            "Redis commands",
            About(
                "Commands that Redis processes in a second, of all its clients.",
                "a few dozen without load; some hundred for each job a second.",
                "much more than our operations: somebody else uses this Redis.",
            ),
            Query("sum by (instance) (rate(redis_commands_processed_total[$__rate_interval]))", "{{instance}}"),
            unit="ops",
            width=8,
            logs=REDIS_LOGS,
        )
    )
    board.with_panel(
        lines(
            "Redis memory",
            About(
                "Memory that Redis' data takes, and what it may take (0: no limit).",
                "used far below max: some KB for each job of the last 24 hours.",
                "at max it refuses writes, and POST answers 503: raise maxmemory, or lower retention.job.",
            ),
            Query("redis_memory_used_bytes", "{{instance}} used"),
            Query("redis_memory_max_bytes", "{{instance}} max"),
            unit="bytes",
            width=8,
            logs=REDIS_LOGS,
        )
    )
    board.with_panel(
        lines(
            "Redis clients",
            About(
                "Connections to Redis, and how many of them wait for a job.",
                "some for each process; blocked are the workers that wait.",
                "rising without end: processes that do not close theirs. Rejected ones are not in here: see its log.",
            ),
            Query("redis_connected_clients", "{{instance}} connected"),
            Query("redis_blocked_clients", "{{instance}} blocked"),
            unit="short",
            width=8,
            logs=REDIS_LOGS,
        )
    )
    board.with_panel(
        states(
            "Redis writes to disk",
            About(
                "Whether Redis is there, and whether its last write to the append-only file and its last snapshot "
                "worked.",
                "green throughout.",
                "red: its disk is full or broken, and it refuses writes; accepted jobs are not safe until it is "
                "mended.",
            ),
            Query(
                'label_replace(redis_up, "what", "up", "", "")'
                ' or label_replace(redis_aof_last_write_status, "what", "append-only file", "", "")'
                ' or label_replace(redis_rdb_last_bgsave_status, "what", "snapshot", "", "")',
                "{{what}}",
            ),
            {0: ("failed", "red"), 1: ("fine", "green")},
            width=8,
        )
    )


def _store(board: Dashboard) -> None:
    board.with_row(row("S3 store"))
    board.with_panel(
        lines(
            "S3 operations",
            About(
                "Requests to the store in a second, by operation.",
                "GetObject for each file, UploadPart for each part of an archive.",
                "many of one kind and few jobs: retries; see S3 errors.",
            ),
            Query(
                'sum by (operation) (rate(s3_operations_total{instance=~"$instance"}[$__rate_interval])) > 0',
                "{{operation}}",
            ),
            unit="ops",
            stacked=StackingMode.NORMAL,
            width=8,
            logs=S3_LOGS,
        )
    )
    board.with_panel(
        lines(
            "S3 errors",
            About(
                "Share of an operation's requests that failed. A file that does not exist is an error of GetObject "
                "too.",
                "0 %, but for GetObject while callers ask for what is not there.",
                "one operation: its right is missing. All: the store is away, full, or refuses the keys.",
            ),
            Query(
                'sum by (operation) (rate(s3_operations_total{instance=~"$instance",'
                ' status="error"}[$__rate_interval]))'
                ' / (sum by (operation) (rate(s3_operations_total{instance=~"$instance"}[$__rate_interval])) > 0)',
                "{{operation}}",
            ),
            unit="percentunit",
            limits=Limits.at_most(0.01, 0.1),
            width=8,
            logs='{service="app", level=~"warning|error|critical"} |~ "(?i)store|storage|upload"',
        )
    )
    board.with_panel(
        lines(
            "S3 latency",
            About(
                "Time of one request with its body, all operations together.",
                "p50 of some milliseconds; a part of 8 MB takes as long as the network makes it.",
                "p50 up: the store is busy or its disk is. p99 up alone: single requests hang.",
            ),
            *quantiles("s3_operation_duration_seconds"),
            unit="s",
            limits=Limits.at_most(1, 10),
            colors=QUANTILE_COLORS,
            width=8,
            logs=S3_LOGS,
        )
    )
    board.with_panel(
        columns(
            "S3 by operation",
            About(
                "Each operation in the time shown.",
                "no errors but of GetObject; UploadPart is the slowest.",
                "click for the store's own lines.",
            ),
            ["operation"],
            Column(
                "Requests",
                'sum by (operation) (increase(s3_operations_total{instance=~"$instance"}[$__range])) > 0',
                "short",
            ),
            Column(
                "Errors",
                'sum by (operation) (increase(s3_operations_total{instance=~"$instance", status="error"}[$__range]))'
                ' / (sum by (operation) (increase(s3_operations_total{instance=~"$instance"}[$__range])) > 0)',
                "percentunit",
                Limits.at_most(0.01, 0.1),
            ),
            *(
                Column(
                    f"p{share}",
                    f"histogram_quantile({share / 100}, sum by (le, operation)"
                    ' (increase(s3_operation_duration_seconds_bucket{instance=~"$instance"}[$__range]))) >= 0',
                    "s",
                    Limits.at_most(1, 10),
                )
                for share in (50, 99)
            ),
            logs=S3_LOGS,
        )
    )


def _nginx_and_traces(board: Dashboard) -> None:
    board.with_row(row("nginx and traces"))
    board.with_panel(
        lines(
            "Connections of nginx",
            About(
                "Connections that clients hold: waiting ones are idle, writing ones are answered or watch a stream.",
                "waiting and writing, as many as there are people.",
                "reading rises: clients that send slowly on purpose; nginx ends them after its time-outs.",
            ),
            Query("sum(nginx_connections_reading)", "reading"),
            Query("sum(nginx_connections_writing)", "writing"),
            Query("sum(nginx_connections_waiting)", "waiting"),
            unit="short",
            width=8,
            logs=NGINX_LOGS,
        )
    )
    board.with_panel(
        lines(
            "Requests at nginx",
            About(
                "Requests that nginx takes in a second, downloads of archives included; the sum of the nginx at the "
                "edge and that of the containers, so each is seen twice.",
                "a little above the API's own number.",
                "much above it: nginx refuses or answers many by itself; its access log has each.",
            ),
            Query("sum(rate(nginx_http_requests_total[$__rate_interval]))", "requests"),
            unit="reqps",
            width=8,
            logs=NGINX_LOGS,
        )
    )
    board.with_panel(
        lines(
            "Spans of traces",
            About(
                "Spans that processes hand to the collector in a second.",
                "sent as long as there is work, and nothing if telemetry.traces.endpoint is not set.",
                "lost: the collector (Jaeger) is away or refuses them; traces have holes until it is back.",
            ),
            Query('sum by (outcome) (rate(trace_spans_total{instance=~"$instance"}[$__rate_interval]))', "{{outcome}}"),
            unit="ops",
            colors={"sent": "green", "lost": "red"},
            width=8,
        )
    )
