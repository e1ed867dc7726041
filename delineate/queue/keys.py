"""Every Redis key and channel of delineate; the one list.

All keys of one queue share a hash tag, so that on Redis Cluster each Lua
transition finds everything it touches in one slot.

    job:{id}              hash    one job; ends 24 h after the job did (failed: 7 days)
    user:{id}:jobs        zset    a caller's job ids by creation time (us); 7 days
    user:{id}:waiting     zset    a caller's waiting jobs beyond the one that has its turn, by place (us)
    queue:wait            list    ids that may be claimed, next at the right; one turn a user, and interrupted jobs
    queue:turns           hash    user -> the id that has the user's turn
    queue:backlog         zset    the ids of every user:{id}:waiting, by place (us)
    queue:paused          string  there while operators want no waiting job to be claimed
    queue:active:{worker} list    ids a worker process holds: the list names its owner
    queue:delayed         zset    ids of attempts waiting for their backoff, by due time (ms)
    queue:failed          list    dead letters, newest at the left
    job:{id}:parts        hash    parts of the job's unfinished upload, by number; ends with the upload
    queue:abandoned       zset    uploads that must be aborted, by due time (ms)
    queue:workers         zset    worker ids by the end of their lease (ms); negative: declared dead at
                                  that time, kept for a while so that a late BLMOVE into its list is found
    idem:{user}:{key}     string  "<fingerprint> <job id>" of an Idempotency-Key; 24 h
    limit:{caller}        string  state of a caller's rate limit; one window
    queue:none            list    never exists; see Queue.check_writes
    channel job:{id}      pub/sub versioned events
    channel worker:{id}   pub/sub empty messages: look at your leases
"""

from __future__ import annotations

import hashlib


class Keys:
    """Names for one prefix; `base` is what Lua puts in front of the keys it makes itself."""

    def __init__(self, prefix: str) -> None:
        self.base = f"{prefix}:{{export}}:"
        self.wait = f"{self.base}queue:wait"
        self.turns = f"{self.base}queue:turns"
        self.backlog = f"{self.base}queue:backlog"
        self.paused = f"{self.base}queue:paused"
        self.delayed = f"{self.base}queue:delayed"
        self.failed = f"{self.base}queue:failed"
        self.abandoned = f"{self.base}queue:abandoned"
        self.workers = f"{self.base}queue:workers"
        self.none = f"{self.base}queue:none"

    def job(self, job_id: str) -> str:
        return f"{self.base}job:{job_id}"

    def parts(self, job_id: str) -> str:
        return f"{self.base}job:{job_id}:parts"

    def channel(self, job_id: str) -> str:
        return f"{self.base}job:{job_id}"

    def worker_channel(self, worker: str) -> str:
        return f"{self.base}worker:{worker}"

    def active(self, worker: str) -> str:
        return f"{self.base}queue:active:{worker}"

    def user_waiting(self, user: str) -> str:
        return f"{self.base}user:{user}:waiting"

    def user_jobs(self, user: str) -> str:
        return f"{self.base}user:{user}:jobs"

    def idempotency(self, user: str, key: str) -> str:
        # A client chooses the key: the digest bounds its length and its characters.
        return f"{self.base}idem:{user}:{hashlib.sha256(key.encode()).hexdigest()}"

    def limit(self, caller: str) -> str:
        return f"{self.base}limit:{caller}"
