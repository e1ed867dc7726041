"""Everything Redis: keys, the job queue, progress events, the Lua transitions."""

from delineate.queue.queue import Enqueued, Queue, QueueStats, RateLimit, Reaped, open_queue
from delineate.queue.record import CorruptRecord

__all__ = ["CorruptRecord", "Enqueued", "Queue", "QueueStats", "RateLimit", "Reaped", "open_queue"]
